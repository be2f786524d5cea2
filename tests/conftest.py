"""What all tests share: no network, helpers under the name `support`, which tests run, and on which kind of CPU (`CPU_UNITS`).

Tests marked `cuda` are skipped where there is no device; of slow tests `--share` chooses some.
"""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, which share the cores; read when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# The folder tests/ itself stays off sys.path: no process may see tests/kernels as the package `kernels` of another project.
support = ModuleType("support")
support.__path__ = [str(Path(__file__).parent / "support")]
sys.modules["support"] = support

from support import cpu_units, shares  # noqa: E402 -- a folder under the name given above

cpu_units.prepare()  # read when torch is imported

import torch  # noqa: E402

_said = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", default="all", help=f"slow tests that run: {', '.join(shares.NAMES)} (HEAD modulo {shares.COUNT}: auto)")
    parser.addoption("--base", default="", help="slow tests with a file changed since this commit run, too (of the day before HEAD)")


def pytest_configure(config: pytest.Config) -> None:
    cpu_units.apply()
    gc.disable()


def pytest_collection_finish() -> None:
    """Exempt modules and collected tests from garbage collection, which costs a quarter of the time of some files."""
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_report_header(config: pytest.Config) -> str:
    return cpu_units.note()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if config.getoption("share") != "all":
        take_share(config, items)
    longest_first(items)


def take_share(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves slow tests of other shares out, but for those whose files have changed.

    A part of one long random search, `slow(part=True)`, waits for its share all the same.
    """
    try:
        turn = shares.turn_of(config.getoption("share"), config.getoption("base"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    slow = [item for item in items if item.get_closest_marker("slow")]
    own = {item.nodeid: () if is_part(item) else shares.files_of(item.path) for item in slow}
    taken = {name for name, files in own.items() if turn.takes(name, files)}
    left = [item for item in slow if item.nodeid not in taken]
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=left)
    config.stash[_said] = list(shares.summary(turn, taken, [item.nodeid for item in left]))


def is_part(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow").kwargs.get("part", False)


def longest_first(items: list[pytest.Item]) -> None:
    """Moves files up by the `minutes` of their longest test, for several processes to begin with."""
    minutes: dict[Path, int] = {}
    for item in items:
        for mark in item.iter_markers("slow"):
            minutes[item.path] = max(minutes.get(item.path, 0), mark.kwargs.get("minutes", 0))
    items.sort(key=lambda item: -minutes.get(item.path, 0))


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()
    if hasattr(session.config, "workeroutput"):  # one of several processes: what it found is said by the first
        session.config.workeroutput["shares"] = session.config.stash.get(_said, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[_said] = getattr(node, "workeroutput", {}).get("shares", [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if lines := config.stash.get(_said, []):
        terminalreporter.section("slow tests by turns")
        for line in lines:
            terminalreporter.line(line)
