"""`report.html` of a run: curves, the recipe, and what the trained model answers to rows it has not seen. One file, nothing loaded."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from idefics2_fast import Idefics2, Processor
from idefics2_fast.adapter_files import load_adapters
from idefics2_fast.training.checkpoint import write_aside
from idefics2_fast.training.page import chart, facts, figure, page, wide
from idefics2_fast.training.recipe import Recipe
from idefics2_fast.training.samples import ImageReference, Sample
from idefics2_fast.training.sources import Rejection, Source
from idefics2_fast.training.telemetry import EVENTS, METRICS
from idefics2_fast.training.trainer import DTYPES

REPORT = "report.html"
MAX_NEW_TOKENS = 64
THUMBNAIL = 240  # pixels, longest side
POINTS = 400  # of a curve; more steps are averaged

# metric, title, unit; those of one chart stand together
CHARTS = (
    (("loss",), "Loss", "nats a trained token"),
    (("tokens_per_s",), "Throughput", "tokens a second, all ranks"),
    (("lr",), "Learning rate", "of AdamW"),
    (("grad_norm",), "Gradient", "norm of all, before clipping"),
    (("fill_tokens", "fill_patches"), "Fill of the packs", "share of the capacity"),
    (("data_wait",), "Data wait", "share of a step"),
)
SUMMED = ("step", "tokens", "images", "seconds", "data_wait", "memory_bytes")  # what each line of metrics has
NAMES = {"fill_tokens": "tokens", "fill_patches": "patches"}


@dataclass(frozen=True)
class Answer:
    """What the model says to a row held out.

    Attributes:
        question: the text before the row's first answer, images as `<image>`.
        expected: that answer; `given`: the model's, greedy.
        pictures: small JPEG files.
    """

    question: str
    expected: str
    given: str
    pictures: tuple[bytes, ...]


@torch.no_grad()
def answer_rows(recipe: Recipe, weights: Path, source: Source, device: torch.device) -> list[Answer | Rejection]:
    """The first answer to each of the last `recipe.held_out` rows of a source, by the weights that a run has left, read anew."""
    whole = recipe.adapter == "full"
    model = Idefics2.from_pretrained(weights if whole else recipe.model, dtype=DTYPES[recipe.dtype], device=device)
    if not whole:
        load_adapters(model, weights)
    processor = Processor.from_pretrained(recipe.model)  # the folder of an adapter does not say how many positions there are
    rows = range(len(source) - recipe.held_out, len(source))
    return [_attempt(source, row, lambda sample: _answer(model, processor, sample)) for row in rows]


def _attempt(source: Source, row: int, answer: Callable[[Sample], Answer]) -> Answer | Rejection:
    """The answer to a row. Whatever it raises costs this row its place in the report, and nothing else: the run is over."""
    try:
        return source.attempt(row, answer)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return Rejection(source.key(row), f"{source.place(row)}: {reason}")


def _answer(model: Idefics2, processor: Processor, sample: Sample) -> Answer:
    first = next((index for index, turn in enumerate(sample.turns) if turn.role == "assistant"), None)
    if first is None:
        raise ValueError("the row has no answer, expected a turn of the assistant")
    pieces = [piece for turn in sample.turns[:first] for piece in turn.pieces]
    images = sample.images[: pieces.count(None)]
    messages = [{"role": turn.role, "content": [_content(piece) for piece in turn.pieces]} for turn in sample.turns[:first]]
    batch = processor.chat(messages, list(images) if images else None)
    given = model.generate(batch.to(model.device), max_new_tokens=MAX_NEW_TOKENS).texts[0]
    question = " ".join("<image>" if piece is None else piece for piece in pieces)
    expected = " ".join(piece for piece in sample.turns[first].pieces if piece is not None)
    return Answer(question, expected.strip(), given.strip(), tuple(map(_thumbnail, images)))


def _content(piece: str | None) -> dict[str, str]:
    return {"type": "image"} if piece is None else {"type": "text", "text": piece}


def _thumbnail(reference: ImageReference) -> bytes:
    opened = (
        reference
        if isinstance(reference, Image.Image)
        else Image.open(io.BytesIO(reference) if isinstance(reference, bytes) else reference)
    )
    image = ImageOps.exif_transpose(opened).convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def write_report(folder: Path, recipe: Recipe, answers: Sequence[Answer | Rejection] = ()) -> Path:
    """Writes the report of the run in a folder from its lines of metrics and events; returns the file."""
    records, bad_records = _lines(folder / METRICS, _is_record)
    events, bad_events = _lines(folder / EVENTS, _is_event)
    parts = [
        _summary(records),
        _unread(METRICS, bad_records),
        *(_chart(records, *chart) for chart in CHARTS),
        _answers(answers),
        _events(events),
        _unread(EVENTS, bad_events),
        _table(recipe),
    ]
    path = folder / REPORT
    write_aside(path, page(f"Run {folder.resolve().name}", "\n".join(filter(None, parts))))
    return path


def _lines(path: Path, is_whole: Callable[[Any], bool]) -> tuple[list[dict[str, Any]], list[int]]:
    """The records of a file of JSON lines, and the numbers of the lines that hold none: a crash or a full disk has cut them."""
    records, bad = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else [], 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if is_whole(value):
            records.append(value)
        else:
            bad.append(number)
    return records, bad


def _is_record(value: Any) -> bool:
    """Whether a value is a line of metrics: those numbers that the summary needs, others where they are."""
    if not isinstance(value, dict) or not all(_is_number(value.get(name)) for name in SUMMED):
        return False
    return value["seconds"] > 0 and all(entry is None or _is_number(entry) for entry in value.values())


def _is_event(value: Any) -> bool:
    return isinstance(value, dict) and _is_number(value.get("step")) and isinstance(value.get("event"), str)


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max


def _unread(name: str, bad: Sequence[int]) -> str:
    if not bad:
        return ""
    shown = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
    return f"<p>{len(bad)} of the lines of {name} cannot be read and are left out: {shown}.</p>"


def _summary(records: Sequence[dict[str, Any]]) -> str:
    if not records:
        return "<p>No step was done.</p>"
    last, seconds = records[-1], sum(record["seconds"] for record in records)
    tokens, images = (sum(record[name] for record in records) for name in ("tokens", "images"))
    figures = [
        ("steps", f"{last['step']:,}"),
        ("last loss", figure(last.get("loss"))),
        ("tokens", f"{tokens:,}"),
        ("images", f"{images:,}"),
        ("tokens/s", figure(tokens / seconds)),
        ("images/s", figure(images / seconds)),
        ("data wait", f"{sum(record['data_wait'] * record['seconds'] for record in records) / seconds:.1%}"),
        ("peak memory", f"{max(record['memory_bytes'] for record in records) / 1e9:.2f} GB"),
    ]
    if "mfu" in last:
        figures.append(("MFU", f"{sum((record.get('mfu') or 0) * record['seconds'] for record in records) / seconds:.1%}"))
    return facts(figures)


# --- curves ---


def _chart(records: Sequence[dict[str, Any]], metrics: Sequence[str], title: str, unit: str) -> str:
    """A figure of one or two curves over the steps; nothing where there is no point."""
    curves = {NAMES.get(name, name): _averaged([(r["step"], r[name]) for r in records if r.get(name) is not None]) for name in metrics}
    return chart({name: curve for name, curve in curves.items() if curve}, title, unit, "step")


def _averaged(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most POINTS points: means of neighbours."""
    size = -(-len(points) // POINTS) or 1
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(round(sum(step for step, _ in group) / len(group)), sum(value for _, value in group) / len(group)) for group in groups]


# --- answers, events, recipe ---


def _answers(answers: Sequence[Answer | Rejection]) -> str:
    if not answers:
        return ""
    good = [answer for answer in answers if isinstance(answer, Answer)]
    exact = sum(answer.given == answer.expected for answer in good)
    rows = "".join(_answer_row(answer) for answer in answers)
    head = "<tr><th>images</th><th>question</th><th>expected</th><th>answer</th></tr>"
    return f"<h2>Rows held out</h2><p>{exact} of {len(good)} answers are exactly the expected ones.</p>{wide(head + rows)}"


def _answer_row(answer: Answer | Rejection) -> str:
    if isinstance(answer, Rejection):
        return f'<tr><td colspan="4">left out: {escape(answer.reason)}</td></tr>'
    pictures = "".join(f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">' for data in answer.pictures)
    mark = "same" if answer.given == answer.expected else "other"
    cells = f"<td>{escape(answer.question)}</td><td>{escape(answer.expected)}</td>"
    return f'<tr><td>{pictures}</td>{cells}<td class="{mark}">{escape(answer.given) or "(empty)"}</td></tr>'


def _events(events: Iterable[dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{e['step']:,}</td><td>{escape(e['event'])}</td><td>{escape(str(e.get('reason', '')))}</td></tr>" for e in events
    )
    head = "<tr><th>step</th><th>event</th><th>reason</th></tr>"
    return f"<h2>Events</h2>{wide(head + rows)}" if rows else ""


def _table(recipe: Recipe) -> str:
    rows = []
    for entry in fields(recipe):
        value = getattr(recipe, entry.name)
        shown = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        source = entry.metadata["source"] if value == entry.default else "set here"
        rows.append(
            f"<tr><td><code>{entry.name}</code></td><td>{escape(shown)}</td><td>{source}</td><td>{escape(entry.metadata['note'])}</td></tr>"
        )
    head = "<tr><th>field</th><th>value</th><th>source</th><th>remark</th></tr>"
    return f"<h2>Recipe</h2><p>Digest <code>{recipe.digest()}</code></p>{wide(head + ''.join(rows))}"
