"""Where rows come from: JSON lines, JSON, Parquet, folders of them, datasets.Dataset, any sequence of rows. One row at a time is in memory,
or one group of rows."""

from __future__ import annotations

import json
import os
import re
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from idefics2_fast.training.columns import Unread
from idefics2_fast.training.folders import PACKED, SUFFIXES, Listing, kind_of
from idefics2_fast.training.order import WINDOW
from idefics2_fast.training.samples import ImageReference, Sample, columns_of, find_format, read_row
from idefics2_fast.training.spans import ArrayScanner, Contents, Limits, Spool, find_lines, reading

LIMITS = Limits()
PROBED = 1024  # rows
TURN_BYTES = 32  # room for what a chat template writes around a turn
REASON = 600  # characters, the longest reason
SNIFFED = 32  # lines of a .json file that may show it to be JSON lines
BATCH = 64  # rows of a row group that are read at once

T = TypeVar("T")


@dataclass(frozen=True)
class Rejection:
    """A row that is left out, and why: the reason names its file and line.

    `rows` were joined to it, itself counted: see `join_pairs`.
    """

    key: str
    reason: str
    rows: int = 1


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
    def parts(self) -> Sequence[Source]:
        """The sources that this one is made of; none where it reads rows itself."""
        return ()

    @property
    def blocks(self) -> np.ndarray:
        """int64 [B], lengths of the runs of rows that are cheap to read together; ones where any row is."""
        return np.ones(len(self), dtype=np.int64)

    def size(self, row: int) -> int:
        """How many rows of a file a row stands for."""
        return 1

    def attempt(self, row: int, use: Callable[[Sample], T]) -> T | Rejection:
        """What `use` makes of a row's sample; or, where the row or the use of it fails in whatever way, the rejection."""
        try:
            return use(self.read(row))
        except BaseException as error:
            return self.reject(row, error)

    def reject(self, row: int, error: BaseException) -> Rejection:
        """The rejection of a row for an error. What ends the program is raised again.

        Data makes libraries raise almost anything: RecursionError, jinja's errors, a Rust library's
        panic, which is a BaseException.
        """
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise error
        return Rejection(self.key(row), _printable(f"{self.place(row)}: {describe(error)}"), self.size(row))


def describe(error: BaseException) -> str:
    """An error in one line of bounded length; all but ValueErrors with their type."""
    text = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    if len(text) > REASON:
        text = f"{text[: REASON // 2]} ... {text[-REASON // 2 :]}"
    return _printable(text)


def _printable(text: str) -> str:
    """Text on one line, in characters that any stream takes."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text)
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Shared:
    """What the files of one source share."""

    limits: Limits
    groups: RowGroups
    spool: Spool = field(default_factory=Spool)
    note: Unread = field(default_factory=Unread)


def open_source(data: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | Source, limits: Limits = LIMITS) -> Source:
    """The source of a file (.jsonl, .json, .parquet), a folder of such files, a datasets.Dataset or any sequence of rows.

    Text may be compressed by gzip (.jsonl.gz, .json.gz). Whether a file of JSON is an array or JSON
    lines, its contents say. A folder that datasets' `save_to_disk` wrote is a source, too, and a
    DatasetDict of one split. Files of a folder that are not read are named in the log, and so are
    columns.

    Args:
        limits: what rows and files may cost.

    Raises:
        ValueError: nothing there, a kind of file that is not read, no row, columns in no known format, several splits, a file over a limit.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, str) and not data:
        raise ValueError("data is empty, expected the path of a file or a folder")
    shared = Shared(limits, RowGroups(2 * limits.group_bytes))
    if not isinstance(data, str | os.PathLike):
        source = Rows(data, shared.note)
    elif (path := Path(data)).is_dir():
        source = _open_folder(path, shared)
    else:
        source = _open_file(path, path.name, shared)
    if len(source) == 0:
        raise ValueError(f"{data if isinstance(data, str | os.PathLike) else 'the sequence of rows'} has no row, expected one or more")
    return source


def check(
    source: Source,
    use: Callable[[Sample], object] = lambda sample: sample,
    threads: int = 1,
) -> Iterator[Rejection]:
    """Every bad row of a source, in its order.

    Args:
        use: raises for a sample that cannot be used. A Planner finds images that cannot be opened and samples too large.
        threads: rows that are looked at at once.
    """
    with ThreadPoolExecutor(threads) as executor:
        for start in range(0, len(source), 16 * threads):
            rows = range(start, min(start + 16 * threads, len(source)))
            for result in executor.map(lambda row: source.attempt(row, use), rows):
                if isinstance(result, Rejection):
                    yield result


def _open_file(path: Path, name: str, shared: Shared) -> Source:
    kind = kind_of(path)
    if not path.exists():
        raise ValueError(f"there is no file or folder {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file, expected one, or a folder")
    if kind is None:
        expected = f"{', '.join(SUFFIXES)} (JSON also with {PACKED})"
        raise ValueError(f"{path} is not read: expected a file that ends in one of {expected}, or a folder")
    if kind == ".parquet":
        return ParquetFile(path, name, shared)
    return _open_json(Contents(path, shared.limits, shared.spool), name, shared, lines=kind == ".jsonl")


def _open_json(contents: Contents, name: str, shared: Shared, lines: bool) -> Source:
    """JSON lines or an array of rows. The file's name says which is tried first."""
    begins = contents.read(contents.text, 4096).lstrip()[:1]
    if lines and begins != b"[":
        return JsonLines(contents, name, shared)
    try:
        return JsonArray(contents, name, shared)
    except ValueError as error:
        if lines:
            return JsonLines(contents, name, shared)
        other = JsonLines(contents, name, shared) if begins == b"{" else None
        if other is not None and other.has_rows():
            return other
        raise ValueError(f"{contents.path} is not a JSON array of rows, nor JSON lines: {error}") from None


def _open_folder(folder: Path, shared: Shared) -> Source:
    if (folder / "dataset_dict.json").is_file():
        return _open_splits(folder, shared)
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        from datasets import load_from_disk

        return Rows(load_from_disk(str(folder)), shared.note)
    listing = Listing(folder)
    if not listing.paths:
        raise ValueError(f"the folder {folder} holds no file that ends in one of {', '.join(SUFFIXES)}")
    sources = []
    for path in listing.paths:
        sources.append(_open_file(path, path.relative_to(folder).as_posix(), shared))
        if len(sources[-1]) == 0:
            listing.unread.append((path, "no row"))
    listing.report()
    return Chain(sources)


def _open_splits(folder: Path, shared: Shared) -> Source:
    """The one split of a DatasetDict that was saved."""
    splits = sorted(path.name for path in folder.iterdir() if (path / "state.json").is_file())
    if len(splits) != 1:
        named = ", ".join(splits) or "none"
        raise ValueError(f"{folder} is a DatasetDict with the splits {named}: expected the folder of one of them, {folder / '<split>'}")
    return _open_folder(folder / splits[0], shared)


class JsonRows(Source):
    """Rows of a JSON file, of which memory holds where they stand."""

    def __init__(self, contents: Contents, name: str, shared: Shared) -> None:
        self.path, self.name, self._contents, self._shared = contents.path, name, contents, shared

    @abstractmethod
    def _text(self, row: int, most: int) -> bytes:
        """The row's JSON, or the beginning of it that has `most` bytes."""

    def _parse(self, row: int) -> Any:
        """The row's value. Raises ValueError."""
        limit = self._shared.limits.row_bytes
        text = self._text(row, limit + 1)
        if len(text) > limit:
            raise ValueError(f"the row has more than {limit} bytes (row_bytes), expected fewer")
        try:
            return json.loads(text.decode("utf-8").removeprefix("\ufeff"), object_pairs_hook=_no_key_twice)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"not valid JSON: {error}") from None
        except RecursionError:
            raise ValueError("the row is nested too deeply to be read") from None

    def read(self, row: int) -> Sample:
        return read_row(self._parse(row), self.key(row), self.path.parent, self._shared.note)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"an object has {twice[:99]!r} twice, expected each key once")
    return value


class JsonLines(JsonRows):
    """A file of one JSON object a line. What is kept in memory is where each line begins: 16 bytes a row. Blank lines are skipped."""

    def __init__(self, contents: Contents, name: str, shared: Shared) -> None:
        super().__init__(contents, name, shared)
        self._starts, self._lines = find_lines(contents)

    def __len__(self) -> int:
        return len(self._lines)

    def key(self, row: int) -> str:
        return f"{self.name}:{self._lines[row]}"

    def place(self, row: int) -> str:
        return f"{self.path}, line {self._lines[row]}"

    def has_rows(self) -> bool:
        """Whether half of the first lines, or more, are rows in a known format."""
        lines = min(len(self), SNIFFED)
        rows = sum(map(self._is_row, range(lines)))
        return rows > 0 and 2 * rows >= lines

    def _is_row(self, row: int) -> bool:
        try:
            find_format(self._parse(row))
        except (ValueError, TypeError, RecursionError):
            return False
        return True

    def _text(self, row: int, most: int) -> bytes:
        start = self._starts[row]
        end = self._starts[row + 1] if row + 1 < len(self) else self._contents.size
        # Blank lines may follow, more of them than a row may have bytes.
        return self._contents.read(start, min(end - start, most)).split(b"\n", 1)[0]


class JsonArray(JsonRows):
    """A file that is one JSON array of rows, as LLaVA's are. 24 bytes a row are kept in memory."""

    def __init__(self, contents: Contents, name: str, shared: Shared) -> None:
        super().__init__(contents, name, shared)
        self._found = ArrayScanner(contents)
        self._found.scan()

    def __len__(self) -> int:
        return len(self._found.starts)

    def key(self, row: int) -> str:
        return f"{self.name}:{row + 1}"

    def place(self, row: int) -> str:
        return f"{self.path}, line {self._found.lines[row]} (row {row + 1})"

    def _text(self, row: int, most: int) -> bytes:
        start, end = self._found.starts[row], self._found.ends[row]
        return self._contents.read(start, min(end - start, most))


class RowGroups:
    """The row groups of Parquet files that were used last: all that two windows of shuffled rows touch, see ShuffledRows.

    A group that cannot be read is remembered as its error, so that its rows do not each read it again.

    Args:
        most: bytes that are held, or two groups.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._tables: OrderedDict[tuple[Path, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path, group: int, read: Callable[[], Any]) -> Any:
        with self._lock:
            if (path, group) not in self._tables:
                self._tables[path, group] = _table_or_error(read)
                while len(self._tables) > 2 and self._too_many():
                    self._tables.popitem(last=False)
            self._tables.move_to_end((path, group))
            found = self._tables[path, group]
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def _too_many(self) -> bool:
        tables = [table for table in self._tables.values() if not isinstance(table, str)]
        rows, size = sum(table.num_rows for table in tables), sum(table.nbytes for table in tables)
        return rows > 3 * WINDOW or size > self._most or len(tables) + 3 * WINDOW < len(self._tables)


def _table_or_error(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # a damaged page makes Arrow raise many kinds, MemoryError too
        return describe(error)


class ParquetFile(Source):
    """A Parquet file, read by row groups. Columns that hold no part of a sample are not read."""

    def __init__(self, path: Path, name: str, shared: Shared) -> None:
        from pyarrow import parquet

        self.path, self.name, self._shared = path, name, shared
        try:
            self._metadata = parquet.read_metadata(path)
            columns = self._metadata.schema.to_arrow_schema().names
        except Exception as error:  # of a damaged footer, anything
            raise ValueError(f"{path} is not a Parquet file: {describe(error)}") from error
        try:
            self._columns = columns_of(columns)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if twice := [name for name in self._columns if columns.count(name) > 1]:
            raise ValueError(f"{path} has the column {twice[0]!r} twice, expected each column once")
        shared.note(set(columns) - set(self._columns), "column")
        groups = map(self._metadata.row_group, range(self._metadata.num_row_groups))
        self._blocks = np.array([group.num_rows for group in groups], np.int64)
        if (self._blocks < 0).any() or self._blocks.sum() != self._metadata.num_rows:
            raise ValueError(f"{path} is damaged: its row groups do not have the rows of the file")
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
        table = self._shared.groups.get(self.path, group, lambda: self._read_group(group))
        (value,) = table.slice(row - int(self._ends[group] - self._blocks[group]), 1).to_pylist()
        return read_row(value, self.key(row), self.path.parent, self._shared.note)

    def _read_group(self, group: int) -> Any:
        """The table of a row group, read a few rows at a time, as its size in the file says little."""
        from pyarrow import Table, parquet

        limit, size, batches = self._shared.limits.group_bytes, 0, []
        with reading(self.path), parquet.ParquetFile(self.path, metadata=self._metadata) as file:
            settings = {"row_groups": [group], "columns": self._columns, "use_threads": False}
            for batch in file.iter_batches(BATCH, **settings):
                batches.append(batch)
                size += batch.nbytes
                if size > limit:
                    raise ValueError(f"its row group takes more than {limit} bytes (group_bytes)")
        table = Table.from_batches(batches)
        if table.num_rows != self._blocks[group]:
            raise ValueError(f"its row group has {table.num_rows} rows, not {self._blocks[group]}")
        return table


class Rows(Source):
    """A datasets.Dataset, or any sequence of rows. A dataset's images stay undecoded."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], note: Unread) -> None:
        if isinstance(rows, Mapping):  # a DatasetDict is one
            rows = _only_split(rows)
        if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
            raise ValueError(f"the data is a {type(rows).__name__}, expected a path or a sequence of rows, with a length")
        if hasattr(rows, "column_names") and hasattr(rows, "cast_column"):
            rows = _undecoded(rows, note)
        self._rows, self._note = rows, note

    @property
    def fingerprint(self) -> str | None:
        """What the sequence says its rows depend on, if it does; see `training/identity.py`."""
        return getattr(self._rows, "fingerprint", None)

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, row: int) -> str:
        return str(row)

    def place(self, row: int) -> str:
        return f"row {row}"

    def read(self, row: int) -> Sample:
        return read_row(self._rows[row], self.key(row), note=self._note)


def _only_split(splits: Mapping[str, Any]) -> Any:
    if len(splits) != 1:
        named = ", ".join(str(name)[:99] for name in list(splits)[:20]) or "none"
        raise ValueError(f"the data is a {type(splits).__name__} with the splits {named}: expected one of them, data[<split>]")
    return next(iter(splits.values()))


def _undecoded(dataset: Any, note: Unread) -> Any:
    """The columns of a datasets.Dataset that are read, its images as bytes and paths.

    A dataset with a transform of its own gives what that makes.
    """
    if dataset.format["type"] == "custom":
        return dataset
    columns = columns_of(dataset.column_names)
    note(set(dataset.column_names) - set(columns), "column")
    dataset = dataset.select_columns(columns).with_format(None)
    for name in columns:
        feature = dataset.features[name]
        undecoded = _without_decoding(feature)
        if undecoded != feature:
            dataset = dataset.cast_column(name, undecoded)
    return dataset


def _without_decoding(feature: Any) -> Any:
    """A feature of datasets in which no image, sound or video is decoded."""
    from datasets import Audio, Image, LargeList, List, Video

    if isinstance(feature, Audio | Image | Video):
        return replace(feature, decode=False)
    if isinstance(feature, List | LargeList):
        return replace(feature, feature=_without_decoding(feature.feature))
    if isinstance(feature, Mapping):
        return {name: _without_decoding(part) for name, part in feature.items()}
    return feature


class First(Source):
    """The first rows of a source: what is trained on where the last ones are held out."""

    def __init__(self, source: Source, rows: int) -> None:
        self._source, self._rows = source, rows

    @property
    def parts(self) -> Sequence[Source]:
        return (self._source,)

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


class Last(First):
    """The last rows of a source: those held out."""

    def __init__(self, source: Source, rows: int) -> None:
        super().__init__(source, rows)
        self._before = len(source) - rows

    def key(self, row: int) -> str:
        return super().key(self._before + row)

    def place(self, row: int) -> str:
        return super().place(self._before + row)

    def read(self, row: int) -> Sample:
        return super().read(self._before + row)


class Chain(Source):
    """Several sources, one after another."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._starts = [0, *accumulate(len(source) for source in sources)]

    @property
    def parts(self) -> Sequence[Source]:
        return self._sources

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
        if not isinstance(pair, tuple):
            groups.append([row])
            continue
        images, size = pair
        group, left = open_groups.get(images, ([], 0))
        if size > left:
            group, left = [], room(len(images))
            groups.append(group)
        group.append(row)
        open_groups[images] = group, left - size
    return Joined(source, groups) if len(groups) < len(source) else source


def _single_pair(sample: Sample) -> tuple[tuple[ImageReference, ...], int] | None:
    """The images and the text's bytes of a sample, if it is one question, behind its images, which are files, and one answer."""
    question, *others = (turn.pieces for turn in sample.turns)
    pieces = [*question[len(sample.images) :], *(piece for other in others for piece in other)]
    single = [turn.role for turn in sample.turns] == ["user", "assistant"] and None not in pieces
    if not single or len(question) == len(sample.images) or not all(isinstance(image, str) for image in sample.images):
        return None
    size = sum(TURN_BYTES + len(piece.encode()) for piece in pieces)
    return (sample.images, size) if sample.images else None


class Joined(Source):
    """Groups of a source's rows as samples of several pairs; a group is named by its first row. See `join_pairs`."""

    def __init__(self, source: Source, groups: Sequence[Sequence[int]]) -> None:
        self._source, self._groups = source, groups

    @property
    def parts(self) -> Sequence[Source]:
        return (self._source,)

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
        """Names the first rows of the group."""
        first, *others = self._groups[row]
        named = ", ".join(map(self._source.key, others[:5]))
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        return self._source.place(first) + (f" (joined with {named}{more})" if others else "")

    def size(self, row: int) -> int:
        return len(self._groups[row])

    def read(self, row: int) -> Sample:
        first, *others = map(self._source.read, self._groups[row])
        turns = [replace(turn, pieces=tuple(filter(None, turn.pieces))) for other in others for turn in other.turns]
        return replace(first, turns=(*first.turns, *turns), pairs=True) if others else first
