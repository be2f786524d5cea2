"""JSON files of a checkpoint: read within bounds, their fields checked against a table."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr
from typing import Any

_shown = Repr()
_shown.maxstring = _shown.maxother = 120
short = _shown.repr  # of a value in a message, however long it is
SIZE_LIMIT = 32 * 2**20  # bytes; parsed, they take at most 30 times as much


@dataclass(frozen=True)
class Field:
    """What a value must be: in words for messages, and as a predicate."""

    expected: str
    holds: Callable[[Any], bool]

    def check(self, value: Any, where: str) -> Any:
        """The value itself.

        Raises:
            ValueError: it is not what `expected` says; `where` names file and field.
        """
        if not self.holds(value):
            raise ValueError(f"{where} is {short(value)}, expected {self.expected}")
        return value


def whole(least: int, most: int) -> Field:
    """An integer; True is none."""
    return Field(f"an integer from {least} to {most}", lambda v: type(v) is int and least <= v <= most)


def real(least: float, most: float = math.inf, *, above: bool = False) -> Field:
    """A finite number; `above` leaves `least` itself out."""

    def holds(value: Any) -> bool:
        return type(value) in (int, float) and least <= value <= most and abs(value) < math.inf and not (above and value == least)

    bounds = f"{'above' if above else 'from'} {least:g}" + (f" to {most:g}" if most < math.inf else "")
    return Field(f"a finite number {bounds}", holds)


def one_of(*values: Any) -> Field:
    """One of a few values of the same type: neither 1 nor 1.0 is True."""
    expected = " or ".join(map(repr, values))
    return Field(expected, lambda v: any(type(v) is type(known) and v == known for known in values))


def optional(field: Field) -> Field:
    """The field, or null."""
    return Field(f"{field.expected}, or null", lambda v: v is None or field.holds(v))


def listed(field: Field, *, least: int = 0) -> Field:
    """A list of at least so many values of a kind."""

    def holds(value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) >= least and all(map(field.holds, value))

    return Field(f"a list of {least or 'any number'} or more, each {field.expected}", holds)


def either(*fields: Field) -> Field:
    """A value that any of the fields takes."""
    return Field(" or ".join(field.expected for field in fields), lambda v: any(field.holds(v) for field in fields))


BOOL = Field("true or false", lambda v: type(v) is bool)
TEXT = Field("text", lambda v: isinstance(v, str))
OBJECT = Field("an object", lambda v: isinstance(v, Mapping))


def check_fields(values: Mapping[str, Any], table: Mapping[str, Field], where: str) -> None:
    """Checks those values that the table knows.

    Args:
        where: the file, or its section, that messages name.

    Raises:
        ValueError: a value that is not what the table expects.
    """
    for name, field in table.items():
        if name in values:
            field.check(values[name], f"{where}{name}")


def read_object(path: Path, *, limit: int = SIZE_LIMIT) -> dict[str, Any]:
    """The object in a file of at most `limit` bytes.

    Raises:
        ValueError: no such file, a larger one, one that is not JSON in UTF-8, or holds anything but an object with distinct keys.
    """
    if os.path.lexists(path):
        require_file(path)
    try:
        size = path.stat().st_size
        if size > limit:
            raise ValueError(f"{path} has {size} bytes, expected {limit} at most")
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return parse_object(text)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None


def read_object_if_there(path: Path) -> dict[str, Any]:
    """The object in a file; empty where nothing bears its name.

    Raises:
        ValueError: as `read_object`, so for a link to nothing.
    """
    return read_object(path) if os.path.lexists(path) else {}


def require_file(path: Path) -> None:
    """Refuses a link to nothing, as a cache that was half copied holds them, a folder, a pipe or a device."""
    if not path.is_file():
        problem = "is a link to nothing" if path.is_symlink() and not path.exists() else "is not a regular file"
        raise ValueError(f"{path} {problem}, expected a file")


def parse_object(text: bytes) -> dict[str, Any]:
    """The object in a file's bytes, in linear time.

    Raises:
        ValueError: as `read_object`, without the file's name.
    """
    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON: {str(error)[:300]}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"holds {type(parsed).__name__}, expected an object")
    return parsed


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, for `json.loads`. Raises ValueError for a key that occurs twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {short(twice)} occurs twice")
    return values
