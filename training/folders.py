"""What a folder of rows holds: the files that are read, in order, and why the others are not."""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".parquet")
PACKED = ".gz"
# Written beside rows by datasets and the Hugging Face hub.
SIDECARS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
NAMED = 10  # files in a message


def kind_of(path: Path) -> str | None:
    """Which of SUFFIXES a name ends in, in lower case, .gz aside; None where it is not read."""
    name = path.name.lower()
    packed = name.endswith(PACKED)
    suffix = Path(name.removesuffix(PACKED)).suffix
    return suffix if suffix in SUFFIXES and not (packed and suffix == ".parquet") else None


@dataclass
class Listing:
    """The files of a folder and of those below it, links followed.

    A file that several names lead to is read once, under the name that needs the fewest links.

    Attributes:
        paths: files to read, in order.
        unread: other files but images, with the reason.

    Raises:
        ValueError: a folder that cannot be read, or one below that datasets has saved.
    """

    folder: Path
    paths: list[Path] = field(default_factory=list)
    unread: list[tuple[Path, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        seen: dict[tuple[int, int], Path] = {}
        for path in self._files():
            reason = _why_not(path) or self._read_before(path, seen)
            if reason is None:
                self.paths.append(path)
            elif path.suffix.lower() not in Image.registered_extensions():
                self.unread.append((path, reason))
        self.paths.sort()
        self.unread.sort()

    def report(self) -> None:
        """Logs once which files are not read, and how many."""
        if self.unread:
            shown = [f"{path.relative_to(self.folder)} ({why})" for path, why in self.unread[:NAMED]]
            more = f" and {len(self.unread) - NAMED} more" if len(self.unread) > NAMED else ""
            count = len(self.unread)
            logger.warning("%s: %d not read: %s%s", self.folder, count, ", ".join(shown), more)

    def _files(self) -> Iterator[Path]:
        """All files, those first that need no link."""
        visited = {_identity(self.folder)}
        folders, links = [self.folder], []
        while folders or links:
            if not folders:
                yield from sorted(path for path in links if not path.is_dir())
                links = sorted(path for path in links if path.is_dir())
                folders += [links.pop(0)] if links else []
                if folders and _identity(folders[0]) in visited:
                    self.unread.append((folders.pop(), "a link to a folder that is read already"))
                continue
            folder = folders.pop()
            visited.add(_identity(folder))
            for path in sorted(_entries(folder)):
                if path.name.startswith(".") and path.is_dir():
                    self.unread.append((path, "hidden"))
                elif path.is_symlink():
                    links.append(path)
                elif path.is_dir():
                    folders.append(path)
                else:
                    yield path

    def _read_before(self, path: Path, seen: dict[tuple[int, int], Path]) -> str | None:
        if path.name.lower().endswith(PACKED) and path.with_name(path.name[: -len(PACKED)]).is_file():
            return "the file decompressed is beside it"
        first = seen.setdefault(_identity(path), path)
        return None if first is path else f"the same file as {first.relative_to(self.folder)}"


def _entries(folder: Path) -> list[Path]:
    try:
        paths = list(folder.iterdir())
    except OSError as error:
        raise ValueError(f"the folder {folder} cannot be read: {error.strerror}") from error
    names = {path.name for path in paths}
    if {"state.json", "dataset_info.json"} <= names or "dataset_dict.json" in names:
        raise ValueError(f"{folder} is a saved dataset in a folder of files: expected one of the two")
    return paths


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _why_not(path: Path) -> str | None:
    """Why a file of a folder is not read; None where it is."""
    name = path.name
    if name.startswith(".") or name.endswith(("~", "#")):
        return "hidden, or an editor's copy"
    if kind_of(path) is None:
        return f"expected {', '.join(SUFFIXES)}"
    if name in SIDECARS:
        return "describes a dataset"
    if not path.exists():
        return "a link to nothing"
    return None if stat.S_ISREG(path.stat().st_mode) else "not a regular file"
