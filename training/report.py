"""`report.html` of a run: curves, the recipe, and what the trained model answers to rows it has not seen. One file, nothing loaded."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from idefics2_fast import Idefics2, Processor
from idefics2_fast.adapter_files import load_adapters
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
    return [source.attempt(row, lambda sample: _answer(model, processor, sample)) for row in rows]


def _answer(model: Idefics2, processor: Processor, sample: Sample) -> Answer:
    first = next(index for index, turn in enumerate(sample.turns) if turn.role == "assistant")
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
    records = _lines(folder / METRICS)
    parts = [
        _summary(records),
        *(_chart(records, *chart) for chart in CHARTS),
        _answers(answers),
        _events(_lines(folder / EVENTS)),
        _table(recipe),
    ]
    path = folder / REPORT
    path.write_text(PAGE.format(title=escape(f"Run {folder.resolve().name}"), body="\n".join(filter(None, parts))), encoding="utf-8")
    return path


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _summary(records: Sequence[dict[str, Any]]) -> str:
    if not records:
        return "<p>No step was done.</p>"
    last, seconds = records[-1], sum(record["seconds"] for record in records)
    tokens, images = (sum(record[name] for record in records) for name in ("tokens", "images"))
    figures = [
        ("steps", f"{last['step']:,}"),
        ("last loss", _figure(last["loss"])),
        ("tokens", f"{tokens:,}"),
        ("images", f"{images:,}"),
        ("tokens/s", _figure(tokens / seconds)),
        ("images/s", _figure(images / seconds)),
        ("data wait", f"{sum(record['data_wait'] * record['seconds'] for record in records) / seconds:.1%}"),
        ("peak memory", f"{max(record['memory_bytes'] for record in records) / 1e9:.2f} GB"),
    ]
    if "mfu" in last:
        figures.append(("MFU", f"{sum(record['mfu'] * record['seconds'] for record in records) / seconds:.1%}"))
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{figure}</dd></div>' for name, figure in figures)}</dl>"


# --- curves ---

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 220, 64, 24, 12, 28


def _chart(records: Sequence[dict[str, Any]], metrics: Sequence[str], title: str, unit: str) -> str:
    """A figure of one or two curves over the steps; nothing where there is no point."""
    curves = {name: _averaged([(r["step"], r[name]) for r in records if r.get(name) is not None]) for name in metrics}
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    steps, values = zip(*points, strict=True)
    x0, x1, low, high = min(steps), max(steps), min(values), max(values)
    ticks = _ticks(min(low, 0) if low >= 0 and low < 0.5 * high else low, high)
    y0, y1 = ticks[0], ticks[-1]
    x = lambda step: LEFT + (WIDTH - LEFT - RIGHT) * ((step - x0) / (x1 - x0) if x1 > x0 else 0.5)  # noqa: E731
    y = lambda value: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - y0) / (y1 - y0)  # noqa: E731
    grid = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" class="y">{_figure(tick)}</text>'
        for tick in ticks
    )
    grid += "".join(
        f'<text x="{x(step):.1f}" y="{HEIGHT - 8}" class="x">{step:,}</text>' for step in sorted({x0, round((x0 + x1) / 2), x1})
    )
    grid += f'<text x="{LEFT - 8}" y="{HEIGHT - 8}" class="axis">step</text>'
    drawn = "".join(_curve([(x(step), y(value)) for step, value in curve], index) for index, curve in enumerate(curves.values()) if curve)
    legend = "".join(f' <span class="c{index}">{escape(NAMES[name])}</span>' for index, name in enumerate(curves) if len(curves) > 1)
    caption = f"<figcaption>{escape(title)} <small>{escape(unit)}</small>{legend}</figcaption>"
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over steps">'
    return f"<figure>{caption}{svg}{grid}{drawn}</svg></figure>"


def _curve(points: Sequence[tuple[float, float]], index: int) -> str:
    if len(points) == 1:
        return f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3" class="c{index}"/>'
    return f'<polyline class="c{index}" points="{" ".join(f"{px:.1f},{py:.1f}" for px, py in points)}"/>'


def _averaged(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most POINTS points: means of neighbours."""
    size = -(-len(points) // POINTS) or 1
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(round(sum(step for step, _ in group) / len(group)), sum(value for _, value in group) / len(group)) for group in groups]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, around a range."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _figure(value: float | None) -> str:
    """Four digits that say something."""
    if value is None:
        return "not finite"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# --- answers, events, recipe ---


def _answers(answers: Sequence[Answer | Rejection]) -> str:
    if not answers:
        return ""
    good = [answer for answer in answers if isinstance(answer, Answer)]
    exact = sum(answer.given == answer.expected for answer in good)
    rows = "".join(_answer_row(answer) for answer in answers)
    head = "<tr><th>images</th><th>question</th><th>expected</th><th>answer</th></tr>"
    return f"<h2>Rows held out</h2><p>{exact} of {len(good)} answers are exactly the expected ones.</p>{_wide(head + rows)}"


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
    return f"<h2>Events</h2>{_wide(head + rows)}" if rows else ""


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
    return f"<h2>Recipe</h2><p>Digest <code>{recipe.digest()}</code></p>{_wide(head + ''.join(rows))}"


def _wide(rows: str) -> str:
    """A table that scrolls on its own where the window is narrow."""
    return f'<div class="wide"><table>{rows}</table></div>'


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{
  --back: #fbfbfa; --text: #1d1f21; --dim: #6b7075; --line: #e2e3e1;
  --first: #2563c9; --second: #c2571a; --good: #1d7a3e; --bad: #b3261e;
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --back: #16181a; --text: #e8e8e6; --dim: #9aa0a6; --line: #34383c;
    --first: #7aa7f0; --second: #eb9a62; --good: #6fce8f; --bad: #f08a83;
  }}
}}
body {{ margin: 2rem auto; max-width: 84rem; padding: 0 1rem; font: 15px/1.45 system-ui, sans-serif; }}
body {{ background: var(--back); color: var(--text); }}
main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1.5rem; }}
main > :not(figure) {{ grid-column: 1 / -1; margin: 0; }}
dl {{ display: flex; flex-wrap: wrap; gap: .5rem 2rem; }}
dt {{ color: var(--dim); font-size: .85rem; }}
dd {{ margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }}
figure {{ margin: 0; }}
figcaption {{ font-weight: 600; }}
small {{ color: var(--dim); font-weight: 400; }}
svg {{ width: 100%; height: auto; }}
svg line {{ stroke: var(--line); }}
svg text {{ fill: var(--dim); font-size: 12px; font-variant-numeric: tabular-nums; }}
.y, .axis {{ text-anchor: end; }}
.x {{ text-anchor: middle; }}
polyline {{ fill: none; stroke-width: 1.8; stroke-linejoin: round; }}
polyline.c0 {{ stroke: var(--first); }} polyline.c1 {{ stroke: var(--second); }}
circle.c0 {{ fill: var(--first); }} circle.c1 {{ fill: var(--second); }}
span.c0 {{ color: var(--first); }} span.c1 {{ color: var(--second); }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left; vertical-align: top; overflow-wrap: anywhere; }}
th, td {{ min-width: 5rem; }}
th {{ color: var(--dim); font-weight: 500; }}
td img {{ max-width: 120px; max-height: 120px; margin-right: .3rem; border: 1px solid var(--line); }}
.same {{ color: var(--good); }} .other {{ color: var(--bad); }}
</style>
</head>
<body>
<h1>{title}</h1>
<main>
{body}
</main>
</body>
</html>
"""
