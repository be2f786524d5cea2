"""The identity of a run: the values of its recipe, and digests of its data, its base model and its processor.

A checkpoint holds the identity of the run that saved it. A run with another one is refused, and the
error names each difference: the recipe's field, the file, the configuration's key.

What is digested (SHA-256), on rank 0:

    files of rows     every byte; the name counts, because samples are drawn by "<file>:<line>"
    rows in memory    every row's turns and images, in their order; a sequence that makes its rows on
                      demand may give a `fingerprint`, which stands for them
    image files       size, and the first, middle and last BLOCK bytes of each, in the rows' order
    base model        the configuration as loaded, every byte of the weights in the run's dtype
    processor         tokenizer, chat template, rules for images

Folders may move: no path is part of an identity.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from PIL import Image

from idefics2_fast import Idefics2, Processor
from idefics2_fast.training.recipe import PLACES, Recipe, hash_of
from idefics2_fast.training.samples import ImageReference, Sample, Turn
from idefics2_fast.training.sources import PROBED, Rejection, Source
from idefics2_fast.training.spans import data_of

T = TypeVar("T")

BLOCK = 4096  # bytes of an image file that are read at its start, middle and end
GROUPS = 256  # digests of image files that are kept apart, so that a difference can be placed
IMAGES = "images of"
THREADS = 8
# Fields that may change from one start of a run to the next, beside PLACES.
CONTINUED = ("steps",)
# The tokenizer's parts that decide token ids; truncation and padding change with its use.
TOKENIZER = ("normalizer", "pre_tokenizer", "post_processor", "model", "added_tokens")


@dataclass(frozen=True)
class Identity:
    """What decides the numbers of a run.

    Attributes:
        recipe: the fields of the recipe but for places, as JSON holds them.
        inputs: for "data", "model" and "processor": a name and a value or digest for each part.
        earlier: the fields in the recipe.json of the run's folder, if there is one: they name what
            changed since a checkpoint of format 1, which holds no identity.
    """

    recipe: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, Any]]
    earlier: Mapping[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """The identity as a checkpoint holds it."""
        return {"recipe": dict(self.recipe), "inputs": {kind: dict(parts) for kind, parts in self.inputs.items()}}

    def differences(self, run: Mapping[str, Any], recipe_hash: str) -> list[str]:
        """How this run differs from that of a checkpoint, one phrase each; none where it may go on.

        Args:
            run: the checkpoint's run.json.
            recipe_hash: of this run's recipe, for a checkpoint of format 1.
        """
        saved = run.get("identity")
        if saved is not None:
            kinds = {**saved["inputs"], **self.inputs}
            inputs = (_of_inputs(kind, saved["inputs"].get(kind, {}), self.inputs.get(kind, {})) for kind in kinds)
            return [*self._of_recipe(saved["recipe"]), *(phrase for phrases in inputs for phrase in phrases)]
        if run["recipe"] == recipe_hash:
            return []
        if self.earlier is not None and hash_of(self.earlier) == run["recipe"]:
            return self._of_recipe(self.earlier)
        return [f"recipe {recipe_hash}, and the checkpoint was saved by recipe {run['recipe']}"]

    def _of_recipe(self, saved: Mapping[str, Any]) -> list[str]:
        """Fields that the saving version did not know count as at their default."""
        before = _as_json({entry.name: entry.default for entry in fields(Recipe)}) | dict(saved)
        ignored = {*PLACES, *CONTINUED}
        changed = [name for name, value in self.recipe.items() if name not in ignored and before[name] != value]
        return [f"the recipe's {name} is {self.recipe[name]!r} and was {before[name]!r}" for name in changed]


def identify(recipe: Recipe, source: Source, model: Idefics2, processor: Processor) -> Identity:
    """The identity of a run.

    Args:
        source: all rows, held out ones too, not joined.
        model: as it was read from its checkpoint.
    """
    inputs = {"data": of_data(source), "model": of_model(model), "processor": of_processor(processor)}
    values = {name: value for name, value in asdict(recipe).items() if name not in PLACES}
    return Identity(_as_json(values), _as_json(inputs), earlier_recipe(Path(recipe.out)))


def earlier_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe that a run's folder holds; None where it holds none that can be read."""
    try:
        values = json.loads((folder / "recipe.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


# --- data ---


def of_data(source: Source) -> dict[str, str]:
    """The digest of each file of rows, or of the rows in memory; and of the image files that they name."""
    files = {file.name: file.path for file in _leaves(source) if hasattr(file, "path")}
    digests = dict(zip(files, _in_threads(_digest_of_file, files.values()), strict=True))
    others = [part for part in _leaves(source) if not hasattr(part, "path")]
    rows = {"rows" if number == 0 else f"rows, part {number + 1}": of_rows(part) for number, part in enumerate(others)}
    made = any(getattr(part, "fingerprint", None) is not None for part in others)
    return {**digests, **rows, **({} if made else of_image_files(source))}


def _leaves(source: Source) -> Iterator[Source]:
    """The sources that a source is made of."""
    if not source.parts:
        yield source
    for part in source.parts:
        yield from _leaves(part)


def of_rows(source: Source) -> str:
    """The digest of every row; of a sequence's own `fingerprint` where it has one."""
    fingerprint = getattr(source, "fingerprint", None)
    if fingerprint is not None:
        return _digest([len(source), fingerprint])
    total = hashlib.sha256()
    for row in range(len(source)):
        sample = source.attempt(row, lambda sample: sample)
        shown = "bad" if isinstance(sample, Rejection) else repr([_said(turn) for turn in sample.turns])
        total.update(shown.encode(errors="surrogatepass"))
        for image in () if isinstance(sample, Rejection) else sample.images:
            total.update(b"\0" + _contents(image))
    return f"{len(source)} rows, {total.hexdigest()}"


def _said(turn: Turn) -> tuple[Any, ...]:
    return (turn.role, turn.pieces) if turn.trained else (turn.role, turn.pieces, "not trained")


def _contents(image: ImageReference) -> bytes:
    """The digest of an image that a row holds; nothing is decoded. Files are left to `of_image_files`."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).digest()
    if not isinstance(image, Image.Image):
        return b""
    stream = getattr(image, "fp", None) or getattr(image, "_fp", None)
    if stream is None or stream.closed:
        data = image.tobytes() + _beside_pixels(image)
    elif isinstance(stream, io.BytesIO):
        data = stream.getvalue()
    elif Path(name := str(getattr(stream, "name", ""))).is_file():
        data = _digest_of_image(name).encode()
    else:
        data = _all_of(stream)
    frame = image.tell()
    shown = repr((image.size, image.mode)) + (f" frame {frame}" if frame else "")
    return hashlib.sha256(shown.encode() + data).digest()


def _all_of(stream: IO[bytes]) -> bytes:
    """What a stream holds; it stands where it stood."""
    try:
        place = stream.tell()
        stream.seek(0)
        data = stream.read()
        stream.seek(place)
    except (OSError, ValueError):
        return b"absent"
    return data


def _beside_pixels(image: Image.Image) -> bytes:
    """What of an image decides its colours beside the pixels; b"" for most."""
    palette, clear = image.getpalette("RGBA") if image.mode in ("P", "PA") else None, image.info.get("transparency")
    return repr((palette, clear)).encode() if palette is not None or clear is not None else b""


def of_image_files(source: Source) -> dict[str, str]:
    """At most GROUPS digests, each of the image files of neighbouring rows. Rows are read only if the first PROBED name a file."""
    if not any(_image_files(source, row) for row in range(min(PROBED, len(source)))):
        return {}
    size = -(-len(source) // GROUPS)
    groups = (range(first, min(first + size, len(source))) for first in range(0, len(source), size))
    return {
        f"{IMAGES} row {rows[0] + 1}" if size == 1 else f"{IMAGES} rows {rows[0] + 1} to {rows[-1] + 1}": digest
        for rows, digest in ((rows, _of_group(source, rows)) for rows in groups)
        if digest
    }


def _of_group(source: Source, rows: Sequence[int]) -> str:
    paths = [path for row in rows for path in _image_files(source, row)]
    return _digest(list(_in_threads(_digest_of_image, paths))) if paths else ""


def _image_files(source: Source, row: int) -> list[str]:
    sample = source.attempt(row, lambda sample: sample)
    return [image for image in sample.images if isinstance(image, str)] if isinstance(sample, Sample) else []


def _digest_of_image(path: str) -> str:
    """Of its size and three blocks; "absent" for a file that cannot be read."""
    try:
        if not Path(path).is_file():  # a pipe would keep the run waiting
            return "absent"
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            starts = sorted({0, max(0, size // 2 - BLOCK // 2), max(0, size - BLOCK)})
            return _digest([size, *(os.pread(file.fileno(), BLOCK, start).hex() for start in starts)])
    except (OSError, ValueError):
        return "absent"


def _digest_of_file(path: Path) -> str:
    """Of every byte; of a hole in a sparse file, its place and length."""
    total, end = hashlib.sha256(), 0
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for place, chunk in data_of(file.fileno(), 0, size):
            total.update(b"" if place == end else f"hole {end} {place}".encode())
            total.update(chunk)
            end = place + len(chunk)
    total.update(b"" if end == size else f"hole {end} {size}".encode())
    return total.hexdigest()


# --- model, processor ---


def of_model(model: Idefics2) -> dict[str, Any]:
    """The configuration but for what only answers depend on, and a digest of the weights of each part."""
    values = dict(_flat(asdict(model.config)))
    values.pop("eos_token_ids")
    parts: dict[str, list[str]] = {}
    tensors = dict(sorted(model.hf_tensors().items()))
    for name, digest in zip(tensors, _in_threads(_digest_of_tensor, tensors.values()), strict=True):
        parts.setdefault(_part(name), []).append(f"{name} {digest}")
    return values | {f"weights of {part}": _digest(digests) for part, digests in parts.items()}


def _part(name: str) -> str:
    """vision_model, connector, text_model or lm_head."""
    first, second, *_ = name.split(".")
    return second if first == "model" else first


def _digest_of_tensor(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(repr((str(tensor.dtype), tuple(tensor.shape))).encode() + b"\0" + hashlib.sha256(data).digest()).hexdigest()


def of_processor(processor: Processor) -> dict[str, Any]:
    """Digests of the tokenizer and of its chat template, and the settings that images and samples are planned with."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {} if backend is None else json.loads(backend.to_str())
    names = ("image_seq_len", "shortest_edge", "longest_edge", "positions_per_side", "position_ids", "max_pixels", "max_positions")
    return {
        "tokenizer": _digest([sorted(tokenizer.get_vocab().items()), [parts.get(name) for name in TOKENIZER]]),
        "chat_template": _digest(tokenizer.chat_template),
        **{name: getattr(processor, name) for name in names},
    }


# --- differences ---


def _of_inputs(kind: str, saved: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """What differs in one kind of input; settings of model and processor that only one version knows are passed over.

    Where rows differ, their images do as well: those are left out of the list.
    """
    if any(saved.get(name) != mine.get(name) for name in {*saved, *mine} if not name.startswith(IMAGES)):
        saved, mine = ({name: value for name, value in parts.items() if not name.startswith(IMAGES)} for parts in (saved, mine))
    gone = [name for name in saved if name not in mine] if kind == "data" else []
    new = [name for name in mine if name not in saved] if kind == "data" else []
    renamed = {old: name for old in gone for name in new if mine[name] == saved[old]}
    phrases = [f"{kind}: {old} is called {name} now, and samples are drawn by their file's name" for old, name in renamed.items()]
    phrases += [f"{kind}: {name} is missing" for name in gone if name not in renamed]
    phrases += [f"{kind}: {name} is new" for name in new if name not in renamed.values()]
    changed = [name for name in mine if name in saved and mine[name] != saved[name]]
    return phrases + [f"{kind}: {name} {_change(saved[name], mine[name])}" for name in changed]


def _change(before: Any, now: Any) -> str:
    if _is_digest(before) and _is_digest(now):
        return f"changed (SHA-256 {_short(before)}, now {_short(now)})"
    return f"is {now!r} and was {before!r}"


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value.rpartition(" ")[2]) == 64


def _short(digest: str) -> str:
    """With the number of rows before it, if it has one."""
    counted, space, value = digest.rpartition(" ")
    return f"{counted}{space}{value[:12]}"


# --- digests ---


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _in_threads(work: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
    """In order. An exception, that of a signal too, leaves without waiting for the items under way."""
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="digest")
    try:
        return list(threads.map(work, items))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
