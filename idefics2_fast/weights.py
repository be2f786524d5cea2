"""Weights on disk: Hugging Face's safetensors checkpoints, both ways, without a second copy in memory.

A file's bytes are read straight into the model's own memory. A memory-mapped file would count twice while it is copied: its pages are
resident beside the copy. Every check on names, shapes, dtypes and byte ranges happens before the first byte of data is read.

The format (https://huggingface.co/docs/safetensors): 8 bytes, little-endian, with the length of the header; the header, a JSON object of
`name: {"dtype", "shape", "data_offsets"}`; then the data without holes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from io import FileIO
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from idefics2_fast.generation_config import eos_ids, read_generation_config
from idefics2_fast.json_files import SIZE_LIMIT, parse_object, short

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
POSITION_TABLE = "model.vision_model.embeddings.position_embedding.weight"
SHARD_BYTES = 5 * 10**9
STAGING_BYTES = 16 * 2**20

HEADER_LIMIT = SIZE_LIMIT  # three hundred thousand tensors; the reference implementation's 100 MB take gigabytes once parsed
MAX_DIMENSIONS = 64  # of a tensor in torch
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Buffers that transformers once saved and now computes.
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")
# How the names and the dtypes of a quantised checkpoint give it away; names first, since they tell more.
QUANTISED_NAMES = {
    "bitsandbytes 4-bit": re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map)$|\.quant_state\."),
    "bitsandbytes 8-bit": re.compile(r"\.(SCB|weight_format)$"),
    "GPTQ or AWQ 4-bit or 8-bit": re.compile(r"\.(qweight|qzeros|g_idx)$"),
    "8-bit float": re.compile(r"\.(weight_scale|weight_scale_inv|input_scale)$"),
}
QUANTISED_DTYPES = re.compile(r"[IU]8|F[468]_.*|F4")
# What a checkpoint's folder on the hub is allowed to bring: no pickles, no code.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]


Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a safetensors file; its bytes are [start, end) of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def load_weights(tensors: Mapping[str, Tensor], source: Path, *, progress: Progress | None = None) -> None:
    """Fills `tensors` from a checkpoint: one `model.safetensors`, or shards and their index.

    bf16, fp16 and fp32 convert into each other, through 16 MiB of staging. A square table of vision positions of another size is resized.

    Args:
        tensors: destinations, contiguous, by Hugging Face's names; on any device.
        source: the checkpoint's folder.
        progress: called after each tensor with the bytes read so far and the bytes in all.

    Raises:
        ValueError: no safetensors; a damaged header, index or file; missing, unexpected or mis-shaped weights; a quantised checkpoint.
            `tensors` are still untouched then, but for a file that shrinks while it is read and a value too large for float16.
    """
    entries = _matching_entries(tensors, Path(source))
    staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=any(tensor.is_cuda for tensor in tensors.values()))
    done, total = 0, sum(entry.end - entry.start for entry in entries.values())
    by_place = sorted(entries.items(), key=lambda item: (item[1].file, item[1].start))
    for path, group in groupby(by_place, key=lambda item: item[1].file):
        with open(path, "rb", buffering=0) as file:
            for name, entry in group:
                _fill(tensors[name].detach(), name, entry, file, staging)
                done += entry.end - entry.start
                if progress is not None:
                    progress(done, total)


def save_weights(
    tensors: Mapping[str, Tensor], folder: Path, *, max_shard_size: int = SHARD_BYTES, progress: Progress | None = None
) -> None:
    """Writes weights that `transformers` loads: one `model.safetensors`, or shards of at most `max_shard_size` bytes and their index.

    The files are written aside and renamed when complete, the one that names the others last: an interrupted save leaves what was there
    before, or nothing that loads, never a part or a mixture. Weights of an older save in the same folder are replaced.

    Args:
        tensors: by Hugging Face's names; bf16, fp16 or fp32, on any device.
        progress: called after each file with the bytes written so far and the bytes in all.

    Raises:
        ValueError: a tensor of another dtype; a shard size that is not positive.
    """
    _save(tensors, Path(folder), max_shard_size, {}, progress)


def save_checkpoint(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    folder: Path,
    *,
    generation: Mapping[str, Any] | None = None,
    max_shard_size: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint's folder as `save_weights` writes its weights: these, config.json and generation_config.json together.

    Args:
        config: the contents of config.json (`Idefics2Config.to_hf`), to which the dtype is added.
        generation: the contents of generation_config.json, to which the ids are added that it lacks.
    """
    ends = {name: config["text_config"][name] for name in ("bos_token_id", "eos_token_id")}
    documents = {
        "config.json": {**config, "dtype": str(_widest(tensor.dtype for tensor in tensors.values())).removeprefix("torch.")},
        "generation_config.json": {**ends, **(generation or {})},
    }
    _save(tensors, Path(folder), max_shard_size, documents, progress)


def check_weights(tensors: Mapping[str, Tensor], source: Path, *, resize: bool) -> None:
    """Refuses a checkpoint that cannot fill `tensors`, from the headers alone.

    Args:
        tensors: as for `load_weights`; on the meta device they take no memory.
        resize: whether a table of vision positions of another size counts as one that can.

    Raises:
        ValueError: as `load_weights`.
    """
    _matching_entries(tensors, Path(source), resize=resize)


def count_stored(folder: Path) -> int:
    """Values in a checkpoint's weights, by the files' headers.

    Raises:
        ValueError: no safetensors, damaged ones, or quantised ones.
    """
    entries = _find_entries(Path(folder))
    _refuse_quantised(entries)
    return sum(math.prod(entry.shape) for entry in entries.values())


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A model's dtype given by itself or by its name; None for the file's own, which "auto" means as well.

    Raises:
        ValueError: another dtype.
    """
    names = {str(known).removeprefix("torch."): known for known in DTYPE_NAMES}
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return None
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in names:
        return names[dtype.removeprefix("torch.")]
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPE_NAMES:
        raise ValueError(f'dtype is {short(dtype)}, expected {", ".join(names)}, "auto" or None')
    return dtype


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that holds a checkpoint's weights exactly: their own, or the widest where they differ, which is logged.

    Raises:
        ValueError: no safetensors, damaged ones, or quantised ones.
    """
    entries = _find_entries(Path(folder))
    _refuse_quantised(entries)
    names: dict[torch.dtype, list[str]] = {}
    for name, entry in entries.items():
        if entry.dtype in DTYPES and not COMPUTED.search(name):
            names.setdefault(DTYPES[entry.dtype], []).append(name)
    if not names:
        raise ValueError(f"{folder} holds no weights in {', '.join(DTYPES)}")
    widest = _widest(names)
    if len(names) > 1:
        counts = ", ".join(f"{_listed(str(dtype).removeprefix('torch.'), of)}" for dtype, of in names.items())
        logger.warning("%s holds tensors of several dtypes, %s: the model is %s, which holds all; dtype= chooses", folder, counts, widest)
    return widest


def resolve_checkpoint(path_or_hub_id: str | os.PathLike[str], revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a checkpoint: a local one as it is, or a repository of the Hugging Face hub (`owner/name`), downloaded once and cached.

    Only weights in safetensors, JSON and tokenizer files are downloaded; pickles and code never.

    Args:
        weights: whether to download these too, 16.8 GB of the released model.

    Raises:
        ValueError: no such folder; the hub has no such repository or cannot be reached and the cache does not hold it.
    """
    given = str(path_or_hub_id)
    path = Path(given).expanduser()
    if given and path.is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r} was given for {path}, a local folder: revisions belong to hub ids")
        return path
    if path.is_file() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", given):
        raise ValueError(f"{given!r} is not the folder of a checkpoint: expected an existing folder or a hub id, owner/name")
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    patterns = [pattern for pattern in HUB_PATTERNS if weights or pattern != "*.safetensors"]
    try:
        return Path(huggingface_hub.snapshot_download(given, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (OSError, HTTPError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        at = "" if revision is None else f" at revision {revision}"
        raise ValueError(f"{given}{at} is neither a folder here nor available from the Hugging Face hub: {reason}") from error


def read_eos_ids(folder: Path, default: tuple[int, ...]) -> tuple[int, ...]:
    """The ids that end a text, from the folder's `generation_config.json`; `default` where the file or the entry is absent.

    The released instruct model ends its turns with `<end_of_utterance>`, which only this file says.

    Raises:
        ValueError: as `read_generation_config`.
    """
    return eos_ids(read_generation_config(folder), default)


def read_header(path: Path) -> dict[str, Entry]:
    """What a safetensors file holds, each byte range checked against the file, the shape and its neighbours.

    Raises:
        ValueError: the file is truncated, or its header is damaged.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if HEADER_LIMIT < length <= size - 8:
            raise ValueError(f"{path} has a header of {length} bytes, expected {HEADER_LIMIT} at most")
        if not 2 <= length <= size - 8:
            raise ValueError(f"{path} is truncated or not safetensors: {size} bytes with a header of {length}")
        header = _parse_header(file.read(length), path)
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, data=8 + length) for name, value in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            found = f"starts at byte {entry.start}, expected {end}: tensors must neither overlap nor leave holes"
            raise ValueError(f"{path}: {short(name)} {found}")
        end = entry.end
    if end != size:
        raise ValueError(f"{path} is truncated or has a tail: {size} bytes where its header speaks of {end}")
    return entries


def _parse_header(text: bytes, path: Path) -> dict[str, Any]:
    try:
        return parse_object(text)
    except ValueError as error:
        raise ValueError(f"{path}: damaged JSON: {error}") from None


def _entry(path: Path, name: str, value: Any, *, data: int) -> Entry:
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(dtype, str) and len(dtype) <= 16 and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        found = f"expected dtype, shape and two data_offsets, found {short(value)}"
        raise ValueError(f"{path}: {short(name)} has a damaged header entry: {found}")
    begin, end = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else end - begin
    if begin > end or end - begin != expected:
        found = f"{end - begin} bytes, expected {expected} for {dtype} {shape}"
        raise ValueError(f"{path}: {short(name)} has {found}")
    return Entry(path, dtype, tuple(shape), data + begin, data + end)


def _are_sizes(value: Any) -> bool:
    """At most as many as a tensor's dimensions, each at most what 64 bits hold."""
    return isinstance(value, list) and len(value) <= MAX_DIMENSIONS and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _matching_entries(tensors: Mapping[str, Tensor], folder: Path, *, resize: bool = True) -> dict[str, Entry]:
    """The checkpoint's entries, one for each of `tensors`, able to fill it."""
    entries = {name: entry for name, entry in _find_entries(folder).items() if not COMPUTED.search(name)}
    _refuse_quantised(entries)
    missing, unexpected = tensors.keys() - entries.keys(), entries.keys() - tensors.keys()
    if missing or unexpected:
        found = f"{_listed('missing', missing)}, {_listed('unexpected', unexpected)}"
        raise ValueError(f"{folder} does not hold this model's weights: {found}")
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise ValueError(f"{entry.file}: {short(name)} is {entry.dtype}, expected one of {', '.join(DTYPES)}")
        shape, expected = entry.shape, tuple(tensors[name].shape)
        if shape != expected and not (resize and name == POSITION_TABLE and _resizable(shape, expected)):
            found = f"has shape {list(shape)}, the model expects {list(expected)}"
            raise ValueError(f"{entry.file}: {short(name)} {found}")
    return entries


def _listed(what: str, names: Iterable[str]) -> str:
    names = sorted(names)
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} {what}" + (f" ({', '.join(map(short, names[:3]))}{more})" if names else "")


def _find_entries(folder: Path) -> dict[str, Entry]:
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    if (folder / INDEX_FILE).is_file():
        return _read_shards(folder / INDEX_FILE)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: expected a checkpoint with {SINGLE_FILE} or {INDEX_FILE}")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if pickles:
        raise ValueError(f"{folder} holds pickled weights ({pickles[0]}), which can run code and are never read: expected {SINGLE_FILE}")
    raise ValueError(f"{folder} holds no weights: expected {SINGLE_FILE} or {INDEX_FILE}")


def _read_shards(index: Path) -> dict[str, Entry]:
    if (size := index.stat().st_size) > HEADER_LIMIT:
        raise ValueError(f"{index} has {size} bytes, expected {HEADER_LIMIT} at most")
    places = _parse_header(index.read_bytes(), index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) and file and Path(file).name == file for file in places.values()):
        raise ValueError(f"{index}: damaged weight_map: expected names of weights and, for each, the name of a file beside the index")
    files = sorted(set(places.values()))
    present = {path.name for path in index.parent.iterdir() if path.is_file()}
    if absent := [file for file in files if file not in present]:
        raise ValueError(f"{index} names files that are not there: {', '.join(map(repr, absent))}")
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(index.parent / file).items():
            if name in entries:
                raise ValueError(f"{entry.file}: {short(name)} occurs a second time, after {entries[name].file.name}")
            entries[name] = entry
    for name, file in places.items():
        if name not in entries or entries[name].file.name != file:
            raise ValueError(f"{index} places {short(name)} in {file}, which does not hold it")
    for name in sorted(entries.keys() - places.keys()):
        raise ValueError(f"{entries[name].file}: {short(name)} is not in the index {index.name}")
    return entries


def _refuse_quantised(entries: Mapping[str, Entry]) -> None:
    kinds = ((name, kind) for name in entries for kind, pattern in QUANTISED_NAMES.items() if pattern.search(name))
    stored = ((name, entry.dtype) for name, entry in entries.items() if QUANTISED_DTYPES.fullmatch(entry.dtype))
    for name, kind in (*kinds, *stored):
        raise ValueError(f"{entries[name].file}: {short(name)} is quantised ({kind}): expected plain {', '.join(DTYPES)} weights")


def _fill(target: Tensor, name: str, entry: Entry, file: FileIO, staging: Tensor) -> None:
    dtype = DTYPES[entry.dtype]
    if entry.shape != tuple(target.shape):
        table = torch.empty(entry.shape, dtype=dtype)
        _read(file, entry.start, table)
        target.copy_(_resize_positions(table, target.shape[0]))
        logger.warning("%s: resized the vision position table from %d to %d rows", entry.file, entry.shape[0], target.shape[0])
    elif target.dtype == dtype and target.device.type == "cpu":
        _read(file, entry.start, target)
    else:
        flat, staging = target.view(-1), staging.view(dtype)
        for first in range(0, flat.numel(), staging.numel()):
            part = staging[: flat.numel() - first]
            _read(file, entry.start + first * dtype.itemsize, part)
            filled = flat[first : first + part.numel()].copy_(part.to(target.device))  # converts on the target's device
            if target.dtype == torch.float16 and filled.isinf().any():
                raise ValueError(f"{entry.file}: {short(name)} holds values beyond float16's range: load it as bfloat16 or float32")


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; no copy."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _read(file: FileIO, start: int, target: Tensor) -> None:
    file.seek(start)
    memory = _bytes(target)
    while memory:
        count = file.readinto(memory)
        if not count:
            raise ValueError(f"{file.name} was truncated while it was read: {len(memory)} bytes are missing")
        memory = memory[count:]


def _resizable(table: Sequence[int], target: Sequence[int]) -> bool:
    """Both are square tables of positions [side * side, C] with the same C."""
    square = all(len(shape) == 2 and shape[0] > 0 and math.isqrt(shape[0]) ** 2 == shape[0] for shape in (table, target))
    return square and table[1] == target[1]


def _resize_positions(table_PC: Tensor, rows: int) -> Tensor:
    """A square position table for another grid, fp32 [rows, C]: bicubic, as between the two stages of pre-training (27x27 to 70x70)."""
    old, new, width = math.isqrt(table_PC.shape[0]), math.isqrt(rows), table_PC.shape[1]
    grid = table_PC.float().view(1, old, old, width).permute(0, 3, 1, 2)
    return F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).reshape(rows, width)


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return reduce(torch.promote_types, dtypes)


def _save(
    tensors: Mapping[str, Tensor],
    folder: Path,
    max_shard_size: int,
    documents: Mapping[str, Mapping[str, Any]],
    progress: Progress | None,
) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is {tensor.dtype}: expected one of {', '.join(map(str, DTYPE_NAMES))}")
    shards = _shards(tensors, max_shard_size)
    if len(shards) > 1:
        documents = {**documents, INDEX_FILE: _index(tensors, shards)}
    aside = folder / ".saving"
    shutil.rmtree(aside, ignore_errors=True)  # of a save that was killed
    aside.mkdir(parents=True)
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())
    try:
        for file, names in shards.items():
            _write_file(aside / file, {name: tensors[name] for name in names})
            done += sum(tensors[name].nbytes for name in names)
            if progress is not None:
                progress(done, total)
        for file, document in documents.items():
            (aside / file).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
        _publish(aside, folder)
    finally:
        shutil.rmtree(aside)


def _shards(tensors: Mapping[str, Tensor], max_shard_size: int) -> dict[str, list[str]]:
    """File names and the weights in each, in order; a weight larger than a shard has one to itself."""
    if max_shard_size <= 0:
        raise ValueError(f"max_shard_size is {max_shard_size}, expected a number of bytes")
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, 1)}


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Wide dtypes first, as the reference writer has them, keep every tensor aligned to its own size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            for part in tensor.detach().reshape(-1).split(STAGING_BYTES // tensor.element_size()):
                file.write(_bytes(part.cpu()))
        file.flush()
        os.fsync(file.fileno())


def _index(tensors: Mapping[str, Tensor], shards: Mapping[str, list[str]]) -> dict[str, Any]:
    numels, sizes = zip(*((tensor.numel(), tensor.nbytes) for tensor in tensors.values()), strict=True)
    return {
        "metadata": {"total_parameters": sum(numels), "total_size": sum(sizes)},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }


def _publish(aside: Path, folder: Path) -> None:
    """Moves complete files into place, and removes the weights of an older save.

    Weights are found through the single file or the index. Unless one file replaces one file, the old ones go first and the new one comes
    last, since the others share names.
    """
    files = sorted((path.name for path in aside.iterdir()), key=(SINGLE_FILE, INDEX_FILE).__contains__)
    if len(files) > 1:
        (folder / SINGLE_FILE).unlink(missing_ok=True)
        (folder / INDEX_FILE).unlink(missing_ok=True)
    for file in files:
        os.replace(aside / file, folder / file)
    for path in (folder / SINGLE_FILE, folder / INDEX_FILE, *folder.glob("model-*-of-*.safetensors")):
        if path.name not in files:
            path.unlink(missing_ok=True)
