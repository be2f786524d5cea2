"""Slow tests by turns: a run takes one share of three, and every test one of whose files has changed.

A test's files are few, so that a change selects few tests: its own, the conftest.py of its folder, the
helpers in tests/support and beside it that these name, and the modules of the product that all of
these name, through the packages' re-exports (`fit` is training/run.py). What those modules import
in turn is not followed, for from the trainer that is nearly everything; but for modules of
benchmarks/, which are helpers of tests, one step, and for the C++ module, which is csrc/.

    python tests/support/shares.py --share auto test-oldest sanitize fuzz    # which of these steps of `make test-all` have their turn
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from zlib import crc32

ROOT = Path(__file__).resolve().parents[2]
COUNT = 3
NAMES = (*map(str, range(COUNT)), "auto", "all")
# Changes since the newest commit that is so much older than HEAD count, those of the working tree among them.
HOURS = 12
ROOMS = ("kernels", "training", "benchmarks")  # packages within idefics2_fast that lie beside it
# Files of every test.
COMMON = ("constraints.txt", "tests/conftest.py")
# Steps of `make test-all` beside pytest's, and their own files.
STEPS = {
    "test-cpus": ("Makefile", "tests/support/cpu_units.py"),
    "test-oldest": ("Makefile", "constraints.txt", "idefics2_fast/patching/*", "kernels/*_triton.py"),
    "sanitize": ("Makefile", "csrc/*"),
    "fuzz": ("Makefile", "csrc/*", "tests/fuzz/*"),
}


@dataclass(frozen=True)
class Turn:
    """What a run takes: `share`, None for all, and what has a file among `changed`, None where that is not known."""

    share: int | None
    changed: frozenset[str] | None
    why: str

    def takes(self, name: str, files: Iterable[str] = (), share: int | None = None) -> bool:
        """Whether a test, or a step with a share of its own, is taken."""
        if self.share is None or self.changed is None:
            return True
        return self.share == (share_of(name) if share is None else share) or not self.changed.isdisjoint(files)


def share_of(test: str) -> int:
    """The share of a test: of its name alone, so that others come and go without moving it."""
    return crc32(test.encode()) % COUNT


def turn_of(share: str, base: str = "", root: Path = ROOT) -> Turn:
    """Reads HEAD, and what has changed since `base`: a commit, or "" for the newest that is HOURS older than HEAD.

    Raises:
        ValueError: an unknown share or commit.
    """
    if share not in NAMES:
        raise ValueError(f"share {share!r}: expected one of {', '.join(NAMES)}")
    if share == "all":
        return Turn(None, frozenset(), "all shares")
    head = _git(root, "rev-parse", "HEAD")
    if not head:
        return Turn(None, None, "all shares, for want of a git repository")
    number = int(head, 16) % COUNT if share == "auto" else int(share)
    if base and not (found := _git(root, "rev-parse", "--verify", "--quiet", f"{base}^{{commit}}")):
        raise ValueError(f"base {base!r}: expected a commit")
    if not base:
        before = int(_git(root, "log", "-1", "--format=%ct")) - HOURS * 3600
        found = _git(root, "rev-list", "-1", f"--before={before}", "HEAD")
    if not found:
        return Turn(number, None, f"all shares, for want of a commit {HOURS} hours older than HEAD")
    lines = _git(root, "diff", "--name-only", "--no-renames", found), _git(root, "ls-files", "--others", "--exclude-standard")
    changed = frozenset("\n".join(lines).split("\n")) - {""}
    return Turn(number, changed, f"share {number} of 0 to {COUNT - 1} (HEAD is {head[:9]}), {len(changed)} files changed since {found[:9]}")


def _git(root: Path, *arguments: str) -> str:
    """Its output; "" where it fails."""
    try:
        done = subprocess.run(["git", "-C", root, "-c", "core.quotePath=false", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


# --- a test's files ---


@cache
def files_of(test: Path, root: Path = ROOT) -> frozenset[str]:
    """The files of a test file's tests, relative to `root`."""
    todo, ours, product = [test, *([test.parent / "conftest.py"] if test.parent != root / "tests" else [])], set(), set()
    while todo:
        path = todo.pop()
        if path in ours or not path.is_file():
            continue
        ours.add(path)
        if path.suffix != ".py":
            continue
        for name in _named(path):
            todo += _helpers(name, path, root)
            product |= set(_product(name, root))
    for path in [path for path in product if path.suffix == ".py"]:
        follow = _product if (root / "benchmarks") in path.parents else _csrc
        product |= {file for name in _named(path) for file in follow(name, root)}
    return frozenset(path.relative_to(root).as_posix() for path in ours | product) | set(COMMON)


@cache
def _named(path: Path) -> frozenset[str]:
    """What a file names: dotted names that it imports or uses, and its strings."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import():
                names |= {alias.name for alias in node.names}
            case ast.ImportFrom(level=0):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            case ast.Attribute():
                names.add(ast.unparse(node))
            case ast.Constant(value=str(value)) if re.fullmatch(r"[\w./-]{1,80}", value):
                names.add(value)
    return frozenset(names)


def _helpers(name: str, path: Path, root: Path) -> Iterator[Path]:
    """Modules of tests/support that are imported, and files there or beside `path` that are named."""
    support = root / "tests" / "support"
    if name.startswith("support."):
        yield support / f"{name.split('.')[1]}.py"
    elif "/" not in name and name.endswith((".py", ".cpp")):
        yield from (support / name, path.parent / name)
    elif "/" not in name and path.parent != support:
        yield path.parent / f"{name}.py"


def _product(name: str, root: Path) -> Iterator[Path]:
    """The modules of the product that a dotted name stands for."""
    package, *rest = name.split(".")
    yield from _csrc(name, root)
    if package != "idefics2_fast" or not rest:
        return
    folder = root if rest[0] in ROOMS else root / package
    while rest and (folder / rest[0]).is_dir():
        folder /= rest.pop(0)
    if not rest:
        yield folder / "__init__.py"
    elif (module := folder / f"{rest[0]}.py").is_file():
        yield module
    elif rest[0] in (homes := _homes(folder / "__init__.py")):
        yield from _product(homes[rest[0]], root)
    elif (folder / "__init__.py").is_file():
        yield folder / "__init__.py"


def _csrc(name: str, root: Path) -> Iterable[Path]:
    """The C++ sources, where a name is that of their module or folder."""
    return (root / "csrc").glob("*") if name == "csrc" or name.startswith("idefics2_fast._C") else ()


@cache
def _homes(init: Path) -> dict[str, str]:
    """What a package re-exports, and the dotted name that it has at home: `_HOMES`, or plain imports."""
    homes, folder = {}, init.parent.name
    package = "idefics2_fast" if folder == "idefics2_fast" else f"idefics2_fast.{folder}"
    for node in ast.parse(init.read_text()).body if init.is_file() else ():
        match node:
            case ast.Assign(targets=[ast.Name(id="_HOMES")], value=value):
                homes |= {name: f"{package}.{home}.{name}" for name, home in ast.literal_eval(value).items()}
            case ast.ImportFrom(level=0, module=str(module)) if module.startswith("idefics2_fast."):
                homes |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
    return homes


# --- what is said ---


def summary(turn: Turn, taken: Iterable[str], left: Iterable[str]) -> Iterator[str]:
    """Lines: the share, then by file the slow tests that are taken and left."""
    taken, left = set(taken), set(left)
    more = sum(share_of(test) != turn.share for test in taken) if turn.share is not None else 0
    yield f"Slow tests: {turn.why}; {len(taken)} taken, {more} of them for their changed files; {len(left)} left"
    for what, tests in (("taken", taken), ("left", left)):
        by_file: dict[str, list[str]] = {}
        for test in sorted(tests):
            by_file.setdefault(test.partition("::")[0], []).append(test.partition("::")[2])
        yield from (f"  {what} of {file}: {', '.join(names)}" for file, names in by_file.items())


def main() -> None:
    """Prints on one line the steps that have their turn, and to stderr what was decided."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", default="auto")
    parser.add_argument("--base", default="")
    parser.add_argument("steps", nargs="+", choices=STEPS)
    given = parser.parse_args()
    try:
        turn = turn_of(given.share, given.base)
    except ValueError as error:
        parser.error(str(error))
    changed = {step: {file for file in turn.changed or () if any(fnmatch(file, own) for own in STEPS[step])} for step in STEPS}
    taken = [step for step in given.steps if turn.takes(step, changed[step], list(STEPS).index(step) % COUNT)]
    print(f"Steps: {turn.why}; taken: {' '.join(taken) or 'none'}", file=sys.stderr)
    print(*taken)


if __name__ == "__main__":
    main()
