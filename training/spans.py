"""Where rows stand in a JSON file: read once in pieces, so that no size of a file costs memory."""

from __future__ import annotations

import array
import errno
import os
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

CHUNK, FEED = 2**20, 2**14  # bytes read at once, and decompressed at once
SPACE = 2**16  # bytes of white space before an element that are taken
BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
# UTF-32 and UTF-16, in both orders of bytes.
OTHER_BOMS = (b"\x00\x00\xfe\xff", b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Limits:
    """What data may cost. A row over a limit is left out by name, a file is refused.

    Attributes:
        row_bytes: of a row's JSON.
        file_bytes: of a file.
        unpacked_bytes: of a .gz file when decompressed, which takes as much room on the disk of
            temporary files.
        group_bytes: of a row group of a Parquet file in memory. Up to three are held.
    """

    row_bytes: int = 2**24
    file_bytes: int = 2**38
    unpacked_bytes: int = 2**33
    group_bytes: int = 2**31

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a number of bytes, 1 or more")


class Spool:
    """One temporary file without a name, which holds what .gz files decompress to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file = None

    def add(self, pieces: Iterator[bytes]) -> tuple[int, int]:
        """Writes pieces; returns where they begin and end."""
        with self._lock:
            if self._file is None:
                self._file = tempfile.TemporaryFile()
            begin = self._file.seek(0, os.SEEK_END)
            for piece in pieces:
                self._file.write(piece)
            self._file.flush()
            return begin, self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()


@dataclass
class Contents:
    """The bytes of a file of rows by offset, decompressed where it is gzip's.

    Attributes:
        size: in bytes.
        text: where it begins: behind a byte order mark.

    Raises:
        ValueError: not a file, one over a limit, one that cannot be read or decompressed, or text
            in UTF-16 or UTF-32.
    """

    path: Path
    limits: Limits
    spool: Spool
    size: int = field(init=False)
    text: int = field(init=False, default=0)
    _begin: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        with reading(self.path):
            self.size = os.stat(self.path).st_size
            if self.size > self.limits.file_bytes:
                raise ValueError(f"{self.path} has {self.size} bytes, expected at most {self.limits.file_bytes} (file_bytes)")
            if self.read(0, len(GZIP)) == GZIP:
                begin, end = self.spool.add(self._unpacked())
                self._begin, self.size = begin, end - begin
        if self.read(0, 4).startswith(OTHER_BOMS):
            raise ValueError(f"{self.path} is UTF-16 or UTF-32, expected UTF-8")
        self.text = len(BOM) if self.read(0, len(BOM)) == BOM else 0

    def read(self, offset: int, size: int) -> bytes:
        """Up to so many bytes from an offset on."""
        with self._open() as (descriptor, begin):
            parts = []
            size = max(0, min(size, self.size - offset))
            while size > 0 and (part := os.pread(descriptor, size, begin + offset)):
                parts.append(part)
                offset, size = offset + len(part), size - len(part)
            return b"".join(parts)

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of the text, in order, as `data_of` gives them."""
        with reading(self.path), self._open() as (descriptor, begin):
            for place, chunk in data_of(descriptor, begin + self.text, begin + self.size):
                yield place - begin, chunk

    @contextmanager
    def _open(self) -> Iterator[tuple[int, int]]:
        """A descriptor to read from with pread, and where the contents begin."""
        if self._begin is not None:
            yield self.spool.fileno(), self._begin
            return
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor, 0
        finally:
            os.close(descriptor)

    def _unpacked(self) -> Iterator[bytes]:
        """What a gzip file of one member or several decompresses to, in pieces."""
        member, total = None, 0
        for packed in self._packed():
            while packed or member is not None:
                if member is None:
                    packed = packed.lstrip(b"\0")  # padding behind a member
                    if not packed:
                        break
                    member = zlib.decompressobj(wbits=31)
                piece = member.decompress(packed, CHUNK)
                packed = member.unused_data if member.eof else member.unconsumed_tail
                total += len(piece)
                if total > self.limits.unpacked_bytes:
                    raise ValueError(
                        f"{self.path} decompresses to more than {self.limits.unpacked_bytes} bytes"
                        " (unpacked_bytes): expected fewer, or the file decompressed"
                    )
                yield piece
                if member.eof:
                    member = None
                elif not packed and len(piece) < CHUNK:
                    break  # all that came in has come out
        if member is not None:
            raise ValueError(f"{self.path} cannot be decompressed: it ends too early")

    def _packed(self) -> Iterator[bytes]:
        """The file in pieces that are small, as the rest is copied at the end of each member."""
        for _, chunk in self.chunks():
            yield from (chunk[start : start + FEED] for start in range(0, len(chunk), FEED))


def data_of(descriptor: int, place: int, end: int) -> Iterator[tuple[int, bytes]]:
    """(place, bytes) of what an open file holds up to an end. Holes of sparse files are passed over."""
    while place < end:
        try:
            place = os.lseek(descriptor, place, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here on
                return
            if error.errno != errno.EINVAL:  # a file system that knows no holes
                raise
        chunk = os.pread(descriptor, min(CHUNK, max(0, end - place)), place)
        if not chunk:
            return
        yield place, chunk
        place += len(chunk)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of reading and decompressing a file as ValueErrors that name it."""
    try:
        yield
    except zlib.error as error:
        raise ValueError(f"{path} cannot be decompressed: {error}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def find_lines(contents: Contents) -> tuple[array.array, array.array]:
    """Where each line that is not blank begins, and its number, from 1."""
    starts, numbers = array.array("q"), array.array("q")
    start = end = contents.text
    number, blank = 1, True  # of the line that is being read
    for offset, chunk in contents.chunks():
        blank = blank and offset == end  # a hole is full of zeros
        end = offset + len(chunk)
        *lines, last = chunk.split(b"\n")
        position = end - len(last) - len(lines) - sum(map(len, lines))
        for line in lines:
            if not (blank and (not line or line.isspace())):
                starts.append(start)
                numbers.append(number)
            position += len(line) + 1
            start, number, blank = position, number + 1, True
        blank = blank and (not last or last.isspace())
    if not blank or end < contents.size:
        starts.append(start)
        numbers.append(number)
    return starts, numbers


OPENS, CLOSES, COMMA = 1, 2, 3
KINDS = np.zeros(256, np.uint8)
KINDS[list(b"[{")], KINDS[list(b"]}")], KINDS[ord(",")] = OPENS, CLOSES, COMMA
DELTA = np.array([0, 1, -1, 0], np.int64)


class ArrayScanner:
    """Finds the elements of a JSON array: their beginnings, ends and lines. What is inside of them
    is not looked at but for brackets and quotes.

    Raises:
        ValueError: from `scan`: not one array, or two elements without a comma between them.
    """

    def __init__(self, contents: Contents) -> None:
        self.starts, self.ends, self.lines = (array.array("q") for _ in range(3))
        self._contents = contents
        self._depth, self._quoted, self._line = 0, 0, 1
        self._after = -1  # the separator before the element that is being read; -1 before the array
        self._start = self._start_line = -1  # of that element, once a bracket has opened it
        self._closed = False

    def scan(self) -> None:
        """Goes through the file once."""
        carried, end = b"", self._contents.text
        for offset, chunk in self._contents.chunks():
            if self._depth < 1 and offset > end:
                raise ValueError("a hole in the file")
            end = offset + len(chunk)
            text = carried + chunk
            slashes = len(text) - len(text.rstrip(b"\\"))
            carried = b"\\" if slashes % 2 else b""
            text = text[: len(text) - len(carried)]
            self._scan(text, end - len(text) - len(carried))
        if not self._closed or end < self._contents.size:
            raise ValueError("the array does not end" if self.starts or self._depth else "it is empty")

    def _scan(self, text: bytes, offset: int) -> None:
        codes = np.frombuffer(text.replace(b"\\\\", b"__").replace(b'\\"', b"__"), np.uint8)
        quotes, breaks = np.flatnonzero(codes == ord('"')), np.flatnonzero(codes == ord("\n"))
        places = np.flatnonzero(KINDS[codes])
        quoted = (np.searchsorted(quotes, places) + self._quoted) % 2
        places = places[quoted == 0]
        kinds = KINDS[codes[places]]
        depths = self._depth + np.cumsum(DELTA[kinds])
        self._check_outside(text, places, depths)
        top = (depths == 1) & (kinds == COMMA) | (depths <= 2) & (kinds == OPENS)
        top |= (depths <= 0) & (kinds == CLOSES)
        lines = self._line + np.searchsorted(breaks, places[top])
        for place, kind, depth, line in zip(places[top].tolist(), kinds[top].tolist(), depths[top].tolist(), lines.tolist(), strict=True):
            if kind == OPENS and depth == 2:
                self._open(offset + place, line)
            elif kind == OPENS:
                self._after = offset + place
            else:
                self._close(offset + place, line, last=kind == CLOSES)
        self._depth = int(depths[-1]) if len(depths) else self._depth
        self._quoted = (self._quoted + len(quotes)) % 2
        self._line += len(breaks)

    def _check_outside(self, text: bytes, places: np.ndarray, depths: np.ndarray) -> None:
        """There is but white space before the array and after it."""
        first = int(places[0]) if len(places) else len(text)
        if self._depth == 0 and self._after < 0:
            if text[:first].strip() or (len(places) and text[first : first + 1] != b"["):
                raise ValueError("it does not begin with [")
        elif self._depth == 0 and text.strip():
            raise ValueError("there is more behind the array")
        ends = np.flatnonzero(depths <= 0)
        if len(ends):
            self._closed = True
            end = int(places[ends[0]])
            if text[end : end + 1] != b"]" or text[end + 1 :].strip():
                raise ValueError("there is more behind the array, or it does not end with ]")

    def _open(self, place: int, line: int) -> None:
        if self._start >= 0:
            raise ValueError(f"no comma before the element on line {line}")
        self._start, self._start_line = place, line

    def _close(self, place: int, line: int, last: bool) -> None:
        """Ends an element at the comma or bracket behind it."""
        if self._start < 0:  # a number, a text or nothing
            head = self._contents.read(self._after + 1, min(place - self._after - 1, SPACE))
            if not head.strip():
                if last and not self.starts and place - self._after - 1 <= SPACE:
                    return  # an empty array
                raise ValueError(f"no element before line {line}")
            self._start, self._start_line = self._after + 1 + len(head) - len(head.lstrip()), line
        self.starts.append(self._start)
        self.ends.append(place)
        self.lines.append(self._start_line)
        self._after, self._start = place, -1
