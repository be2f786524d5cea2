"""Where rows come from: JSON lines, JSON, Parquet, folders of them, datasets.Dataset, any sequence of rows. One row at a time is in memory,
or one group of rows."""

from __future__ import annotations

import array
import json
import os
import re
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from idefics2_fast.training.order import WINDOW
from idefics2_fast.training.samples import ImageReference, Sample, Turn, columns_of, read_row

SUFFIXES = (".jsonl", ".json", ".parquet")
PROBED = 1024  # rows
TURN_BYTES = 32  # room for what a chat template writes around a turn

T = TypeVar("T")


@dataclass(frozen=True)
class Rejection:
    """A row that is left out, and why: the reason names its file and line."""

    key: str
    reason: str


class Source(ABC):
    """N rows in a fixed order. Rows may be read from several threads."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, row: int) -> str:
        """The name of a row, the same on any machine."""

    @abstractmethod
    def place(self, row: int) -> str:
        """Where the row stands, for messages."""

    @abstractmethod
    def read(self, row: int) -> Sample:
        """The sample of a row. Raises ValueError, without the place."""

    @property
    def blocks(self) -> np.ndarray:
        """int64 [B], lengths of the runs of rows that are cheap to read together; ones where any row is."""
        return np.ones(len(self), dtype=np.int64)

    def attempt(self, row: int, use: Callable[[Sample], T]) -> T | Rejection:
        """What `use` makes of a row's sample; or, where the row or the use of it raises ValueError, the rejection."""
        try:
            return use(self.read(row))
        except ValueError as error:
            return Rejection(self.key(row), f"{self.place(row)}: {error}")


def open_source(data: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | Source) -> Source:
    """The source of a file (.jsonl, .json, .parquet), a folder of such files, a datasets.Dataset or any sequence of rows.

    A folder that datasets' `save_to_disk` wrote is one, too.

    Raises:
        ValueError: nothing there, a kind of file that is not read, no row, columns in no known format.
    """
    if isinstance(data, Source):
        return data
    if not isinstance(data, str | os.PathLike):
        source = Rows(data)
    elif (path := Path(data)).is_dir():
        source = _open_folder(path)
    else:
        source = _open_file(path, path.name, RowGroups())
    if len(source) == 0:
        raise ValueError(f"{data if isinstance(data, str | os.PathLike) else 'the sequence of rows'} has no row, expected one or more")
    return source


def check(source: Source, use: Callable[[Sample], object] = lambda sample: sample) -> Iterator[Rejection]:
    """Every bad row of a source, in its order.

    Args:
        use: raises ValueError for a sample that cannot be used. A Planner finds images that cannot be opened and samples too large.
    """
    results = (source.attempt(row, use) for row in range(len(source)))
    return (result for result in results if isinstance(result, Rejection))


def _open_file(path: Path, name: str, groups: RowGroups) -> Source:
    if not path.is_file():
        raise ValueError(f"there is no file or folder {path}")
    if path.suffix == ".parquet":
        return ParquetFile(path, name, groups)
    if path.suffix == ".jsonl":
        return JsonLines(path, name)
    if path.suffix == ".json":
        return JsonArray(path, name)
    raise ValueError(f"{path} is not read: expected a file that ends in one of {', '.join(SUFFIXES)}, or a folder")


def _open_folder(folder: Path) -> Source:
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        from datasets import load_from_disk

        return Rows(load_from_disk(str(folder)))
    paths = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(f"the folder {folder} holds no file that ends in one of {', '.join(SUFFIXES)}")
    groups = RowGroups()
    return Chain([_open_file(path, path.relative_to(folder).as_posix(), groups) for path in paths])


class JsonLines(Source):
    """A file of one JSON object a line. What is kept in memory is where each line begins: 16 bytes a row. Blank lines are skipped."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._starts, self._lines = array.array("q"), array.array("q")
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    self._starts.append(offset)
                    self._lines.append(number)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._lines)

    def key(self, row: int) -> str:
        return f"{self.name}:{self._lines[row]}"

    def place(self, row: int) -> str:
        return f"{self.path}, line {self._lines[row]}"

    def read(self, row: int) -> Sample:
        with self.path.open("rb") as file:
            file.seek(self._starts[row])
            line = file.readline()
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"not valid JSON: {error}") from None
        return read_row(value, self.key(row), self.path.parent)


class JsonArray(Source):
    """A file that is one JSON array of rows, as LLaVA's are. It is held in memory whole."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        try:
            self._lines, self._rows = _rows_of_array(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a JSON array of rows: {error}") from None

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, row: int) -> str:
        return f"{self.name}:{row + 1}"

    def place(self, row: int) -> str:
        return f"{self.path}, line {self._lines[row]} (row {row + 1})"

    def read(self, row: int) -> Sample:
        return read_row(self._rows[row], self.key(row), self.path.parent)


def _rows_of_array(text: str) -> tuple[list[int], list[Any]]:
    """The elements of a JSON array, and the line on which each begins."""
    skip_space, decode = re.compile(r"\s*").match, json.JSONDecoder().raw_decode
    lines, rows = [], []
    line, counted, end = 1, 0, skip_space(text).end()
    if text[end : end + 1] != "[":
        raise json.JSONDecodeError("Expecting '['", text, end)
    start = skip_space(text, end + 1).end()
    while text[start : start + 1] != "]":
        line, counted = line + text.count("\n", counted, start), start
        value, end = decode(text, start)
        lines.append(line)
        rows.append(value)
        start = skip_space(text, end).end()
        if text[start : start + 1] == ",":
            start = skip_space(text, start + 1).end()
        elif text[start : start + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, start)
    return lines, rows


class RowGroups:
    """The row groups of Parquet files that were used last: all that two windows of shuffled rows touch, see ShuffledRows."""

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[Path, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path, group: int, read: Callable[[], Any]) -> Any:
        with self._lock:
            if (path, group) not in self._tables:
                self._tables[path, group] = read()
                while len(self._tables) > 2 and sum(table.num_rows for table in self._tables.values()) > 3 * WINDOW:
                    self._tables.popitem(last=False)
            self._tables.move_to_end((path, group))
            return self._tables[path, group]


class ParquetFile(Source):
    """A Parquet file, read by row groups. Columns that hold no part of a sample are not read."""

    def __init__(self, path: Path, name: str, groups: RowGroups) -> None:
        from pyarrow import parquet

        self.path, self.name, self._groups = path, name, groups
        try:
            self._metadata = parquet.read_metadata(path)
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise ValueError(f"{path} is not a Parquet file: {error}") from error
        try:
            self._columns = columns_of(self._metadata.schema.to_arrow_schema().names)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self._blocks = np.array([self._metadata.row_group(group).num_rows for group in range(self._metadata.num_row_groups)], np.int64)
        self._ends = np.cumsum(self._blocks)

    def __len__(self) -> int:
        return self._metadata.num_rows

    @property
    def blocks(self) -> np.ndarray:
        return self._blocks

    def key(self, row: int) -> str:
        return f"{self.name}:{row + 1}"

    def place(self, row: int) -> str:
        return f"{self.path}, row {row + 1}"

    def read(self, row: int) -> Sample:
        group = int(np.searchsorted(self._ends, row, side="right"))
        table = self._groups.get(self.path, group, lambda: self._read_group(group))
        (value,) = table.slice(row - int(self._ends[group] - self._blocks[group]), 1).to_pylist()
        return read_row(value, self.key(row), self.path.parent)

    def _read_group(self, group: int) -> Any:
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(self.path, metadata=self._metadata) as file:
                return file.read_row_group(group, columns=self._columns, use_threads=False)
        except OSError as error:
            raise ValueError(f"the row group {group} cannot be read: {error}") from error


class Rows(Source):
    """A datasets.Dataset, or any sequence of rows. A dataset's images stay undecoded."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
            raise ValueError(f"the data is a {type(rows).__name__}, expected a path or a sequence of rows, with a length")
        if hasattr(rows, "column_names") and hasattr(rows, "cast_column"):
            rows = _undecoded(rows)
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, row: int) -> str:
        return str(row)

    def place(self, row: int) -> str:
        return f"row {row}"

    def read(self, row: int) -> Sample:
        return read_row(self._rows[row], self.key(row))


def _undecoded(dataset: Any) -> Any:
    """The columns of a datasets.Dataset that are read, its images as bytes and paths."""
    from datasets import Image, List

    columns = columns_of(dataset.column_names)
    dataset = dataset.select_columns(columns).with_format(None)
    for name in ("image", "images"):
        if name in columns:
            feature = dataset.features[name]
            if isinstance(feature, Image):
                dataset = dataset.cast_column(name, Image(decode=False))
            elif isinstance(getattr(feature, "feature", None), Image):
                dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset


class First(Source):
    """The first rows of a source: what is trained on where the last ones are held out."""

    def __init__(self, source: Source, rows: int) -> None:
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return self._rows

    def key(self, row: int) -> str:
        return self._source.key(row)

    def place(self, row: int) -> str:
        return self._source.place(row)

    def read(self, row: int) -> Sample:
        return self._source.read(row)

    @property
    def blocks(self) -> np.ndarray:
        ends = np.minimum(np.cumsum(self._source.blocks), self._rows)
        lengths = np.diff(ends, prepend=0)
        return lengths[lengths > 0]


class Chain(Source):
    """Several sources, one after another."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._starts = [0, *accumulate(len(source) for source in sources)]

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def blocks(self) -> np.ndarray:
        return np.concatenate([source.blocks for source in self._sources])

    def key(self, row: int) -> str:
        source, row = self._find(row)
        return source.key(row)

    def place(self, row: int) -> str:
        source, row = self._find(row)
        return source.place(row)

    def read(self, row: int) -> Sample:
        source, row = self._find(row)
        return source.read(row)

    def _find(self, row: int) -> tuple[Source, int]:
        index = bisect_right(self._starts, row) - 1
        return self._sources[index], row - self._starts[index]


def join_pairs(source: Source, room: Callable[[int], int]) -> Source:
    """The source, where rows that ask one question each about the same image files are one sample of several pairs.

    Every row is read once, here. An image's bytes are not compared: rows that hold them stay as they are. Where none of the first PROBED
    rows can be joined to another, no more are read.

    Args:
        room: bytes of text that a sample of so many images has room for.
    """
    groups: list[list[int]] = []
    open_groups: dict[tuple[ImageReference, ...], tuple[list[int], int]] = {}  # the last of some images, and the room that it has left
    for row in range(len(source)):
        if row == PROBED and not open_groups:
            return source
        pair = source.attempt(row, _single_pair)
        if not isinstance(pair, Sample):
            groups.append([row])
            continue
        size = sum(TURN_BYTES + len(piece.encode()) for turn in pair.turns for piece in turn.pieces if piece is not None)
        group, left = open_groups.get(pair.images, ([], 0))
        if size > left:
            group, left = [], room(len(pair.images))
            groups.append(group)
        group.append(row)
        open_groups[pair.images] = group, left - size
    return Joined(source, groups) if len(groups) < len(source) else source


def _single_pair(sample: Sample) -> Sample | None:
    """The sample, if it is one question, behind its images, which are files, and one answer."""
    pieces = [piece for turn in sample.turns for piece in turn.pieces]
    single = [turn.role for turn in sample.turns] == ["user", "assistant"] and None not in pieces[len(sample.images) :]
    return sample if single and sample.images and all(isinstance(image, str) for image in sample.images) else None


class Joined(Source):
    """Groups of a source's rows as samples of several pairs; a group is named by its first row. See `join_pairs`."""

    def __init__(self, source: Source, groups: Sequence[Sequence[int]]) -> None:
        self._source, self._groups = source, groups

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def blocks(self) -> np.ndarray:
        """The source's, of the rows that are named."""
        named = np.array([group[0] for group in self._groups])
        lengths = np.diff(np.searchsorted(named, np.cumsum(self._source.blocks)), prepend=0)
        return lengths[lengths > 0]

    def key(self, row: int) -> str:
        return self._source.key(self._groups[row][0])

    def place(self, row: int) -> str:
        return self._source.place(self._groups[row][0])

    def read(self, row: int) -> Sample:
        first, *others = map(self._source.read, self._groups[row])
        turns = [Turn(turn.role, tuple(filter(None, turn.pieces))) for other in others for turn in other.turns]
        return replace(first, turns=(*first.turns, *turns), pairs=True) if others else first
