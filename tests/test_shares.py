"""Slow tests by turns: each in one share, and all that a change touches in every share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support import shares

ROOT = shares.ROOT
# A repository in small: a file's path and what it holds. tests/training/test_fit.py is the slow test.
FILES = {
    "constraints.txt": "torch==1.0\n",
    "README.md": "",
    "csrc/geometry.cpp": "",
    "idefics2_fast/__init__.py": "_HOMES = {'Idefics2': 'model', 'Segments': 'kernels.segments'}",
    "idefics2_fast/config.py": "",
    "idefics2_fast/model.py": "from idefics2_fast.config import Config",
    "idefics2_fast/ops.py": "",
    "idefics2_fast/images.py": "from idefics2_fast import _C",
    "idefics2_fast/weights.py": "",
    "idefics2_fast/patching/__init__.py": "from idefics2_fast.patching.dora import Unsupported",
    "idefics2_fast/patching/dora.py": "",
    "kernels/segments.py": "",
    "training/__init__.py": "_HOMES = {'fit': 'run'}",
    "training/run.py": "",
    "training/trainer.py": "",
    "training/report.py": "",
    "training/page.py": "",
    "training/plan.py": "",
    "benchmarks/harness.py": "from idefics2_fast.training import report, page",
    "tests/conftest.py": "",
    "tests/test_other.py": "from idefics2_fast import config",
    "tests/support/corpus.py": "import support.drawing\nfrom idefics2_fast.images import pack_images",
    "tests/support/drawing.py": "def draw():\n    from idefics2_fast.training.plan import plan",
    "tests/support/unused.py": "",
    "tests/training/conftest.py": "from idefics2_fast import Segments",
    "tests/training/toy.py": "",
    "tests/training/worker_plugin.py": "import idefics2_fast.weights",
    "tests/training/test_fit.py": """
import idefics2_fast
from support.corpus import rows
from idefics2_fast import Idefics2, ops as operators
from idefics2_fast.benchmarks import harness
from idefics2_fast.patching import Unsupported
from idefics2_fast.training import fit

def test_fit(monkeypatch):
    monkeypatch.setattr("idefics2_fast.training.trainer.Trainer", None)
    run("toy.py", "-p", "worker_plugin")
""",
}
UNRELATED = {
    "README.md",
    "idefics2_fast/__init__.py",  # every name that is taken from it has its home elsewhere
    "idefics2_fast/config.py",  # model.py's alone
    "idefics2_fast/patching/__init__.py",
    "training/__init__.py",
    "tests/test_other.py",
    "tests/support/unused.py",
}
DAY = 24 * 3600
NOW = 1_800_000_000


def git(root: Path, *arguments: str, at: int = NOW) -> str:
    names = {f"GIT_{role}_{field}": "a@b" for role in ("AUTHOR", "COMMITTER") for field in ("NAME", "EMAIL")}
    dates = {"GIT_AUTHOR_DATE": f"{at} +0000", "GIT_COMMITTER_DATE": f"{at} +0000"}
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, env=os.environ | names | dates, check=True, capture_output=True, text=True).stdout.strip()


def commit(root: Path, at: int, **files: str) -> str:
    for name, text in files.items():
        (root / name).write_text(text)
    git(root, "add", "--all")
    git(root, "commit", "--allow-empty", "-qm", "a change", at=at)
    return git(root, "rev-parse", "HEAD")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    git(tmp_path, "init", "-q")
    commit(tmp_path, NOW - 2 * DAY)
    return tmp_path


# --- shares ---


def test_every_slow_test_is_in_exactly_one_share(request: pytest.FixtureRequest) -> None:
    names = [item.nodeid for item in request.session.items] + [f"tests/test_a.py::test_b[{n}]" for n in range(300)]
    turns = [shares.Turn(share, frozenset({"a"}), "") for share in range(shares.COUNT)]
    assert [sum(turn.takes(name, {"b"}) for turn in turns) for name in names] == [1] * len(names)
    assert all(sum(turn.takes(name) for name in names) > len(names) / 5 for turn in turns)


def test_head_names_the_share(root: Path) -> None:
    commit(root, NOW)
    seen = set()
    for change in range(12):
        head = commit(root, NOW + change)
        turn = shares.turn_of("auto", root=root)
        assert turn.share == int(head, 16) % 3
        assert head[:9] in turn.why
        seen.add(turn.share)
    assert seen == {0, 1, 2}
    assert [shares.turn_of(name, root=root).share for name in ("0", "1", "2", "all")] == [0, 1, 2, None]


@pytest.mark.parametrize(("share", "base"), [("3", ""), ("-1", ""), ("", ""), ("al", ""), ("0", "no-such-commit")])
def test_an_unknown_share_or_base_is_named(root: Path, share: str, base: str) -> None:
    with pytest.raises(ValueError, match="no-such-commit" if base else f"share '{share}': expected one of 0, 1, 2, auto, all"):
        shares.turn_of(share, base, root)


# --- changes ---


@pytest.mark.parametrize("name", FILES)
def test_a_change_takes_the_slow_tests_of_the_file(root: Path, name: str) -> None:
    """In every share; the file is one that the test imports or names, directly or through helpers."""
    commit(root, NOW, **{name: FILES[name] + "\n# changed"})
    shares.files_of.cache_clear()
    files = shares.files_of(root / "tests" / "training" / "test_fit.py", root)
    taken = [shares.turn_of(share, root=root).takes("tests/training/test_fit.py::test_fit", files) for share in "012"]
    assert sum(taken) == (1 if name in UNRELATED else 3)


def test_changes_are_counted_from_half_a_day_before_head(root: Path) -> None:
    old = commit(root, NOW - 13 * 3600, **{"training/run.py": "old = 1"})
    commit(root, NOW - 11 * 3600, **{"training/page.py": "new = 1"})
    commit(root, NOW, **{"training/plan.py": "new = 1"})
    (root / "training" / "trainer.py").write_text("not_committed = 1")
    (root / "training" / "added.py").write_text("")
    git(root, "mv", "training/report.py", "training/moved.py")
    recent = {f"training/{name}.py" for name in ("page", "plan", "trainer", "added", "report", "moved")}
    assert shares.turn_of("auto", root=root).changed == recent
    assert shares.turn_of("auto", old, root).changed == recent
    assert shares.turn_of("auto", f"{old}~1", root).changed == recent | {"training/run.py"}


def test_all_are_taken_where_changes_are_not_known(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A shallow clone, a young repository, and none at all."""
    shallow, bare = tmp_path_factory.mktemp("shallow"), tmp_path_factory.mktemp("bare")
    commit(root, NOW)
    git(root, "clone", "-q", "--depth", "1", root.as_uri(), str(shallow))
    for place in (shallow, bare):
        turn = shares.turn_of("auto", root=place)
        assert "for want of" in turn.why
        assert all(turn.takes(f"test_{n}") for n in range(30))
    assert shares.turn_of("auto", root=root).changed == frozenset()


def test_the_files_of_a_test_are_those_of_what_it_holds(request: pytest.FixtureRequest) -> None:
    """Of all modules collected: the home, as Python has it, of every class, function and module that they import."""
    for module in {item.module for item in request.session.items}:
        files = shares.files_of(Path(module.__file__))
        homes = {name: home_of(value) for name, value in vars(module).items()}
        missing = {name: home for name, home in homes.items() if home and home not in files}
        assert not missing, f"{module.__file__} imports what is not counted among its files"


def home_of(value: Any) -> str | None:
    """The file of the repository, helper or product, where an object is defined."""
    module = value if isinstance(value, ModuleType) else sys.modules.get(getattr(value, "__module__", None) or "")
    name = getattr(module, "__name__", "")
    if not name.startswith(("idefics2_fast.", "support.")) or "_C" in name:
        return None
    return Path(module.__file__).resolve().relative_to(ROOT).as_posix()


# --- pytest and make ---


def item_of(path: str, name: str, slow: bool, **arguments: bool) -> SimpleNamespace:
    mark = SimpleNamespace(kwargs=arguments) if slow else None
    closest = {"slow": mark}.get
    return SimpleNamespace(nodeid=f"{path}::{name}", path=ROOT / path, get_closest_marker=closest)


def test_pytest_leaves_out_what_is_of_other_shares(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    conftest = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    fast = [item_of("tests/test_model.py", f"fast_{n}", slow=False) for n in range(5)]
    slow = [item_of("tests/test_model.py", f"slow_{n}", slow=True) for n in range(20)]
    slow += [item_of("tests/test_images.py", f"part_{n}", slow=True, part=True) for n in range(10)]
    fresh = [item_of("tests/test_images.py", f"fresh_{n}", slow=True) for n in range(5)]
    runs, said = [], []
    for share in range(3):
        turn = shares.Turn(share, frozenset({"idefics2_fast/images.py"}), "share of three")
        monkeypatch.setattr(shares, "turn_of", lambda *_, turn=turn: turn)
        gone, items, stash = [], [*fast, *slow, *fresh], {}
        hook = SimpleNamespace(pytest_deselected=lambda items, gone=gone: gone.extend(items))
        conftest.take_share(SimpleNamespace(getoption=lambda name: "auto", hook=hook, stash=stash), items)
        assert {item.nodeid for item in items} | {item.nodeid for item in gone} == {item.nodeid for item in [*fast, *slow, *fresh]}
        assert items[:5] == fast
        assert items[-5:] == fresh
        runs += [item.nodeid for item in items[5:-5]]
        said += stash[conftest._said]
    assert sorted(runs) == sorted(item.nodeid for item in slow)
    assert sum("share of three; " in line for line in said) == 3
    assert sum(line.startswith("  taken of tests/test_images.py: fresh_0, ") for line in said) == 3
    assert all(any(f"{what} of tests/test_model.py" in line and "slow_7" in line for line in said) for what in ("taken", "left"))


def test_files_with_the_longest_tests_begin(request: pytest.FixtureRequest) -> None:
    conftest = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    given = [("a", []), ("b", [{}]), ("c", [{}]), ("c", [{"minutes": 3}]), ("d", [{"minutes": 20}]), ("d", [])]
    items = [
        SimpleNamespace(path=Path(path), number=number, iter_markers=lambda name, marks=marks: [SimpleNamespace(kwargs=m) for m in marks])
        for number, (path, marks) in enumerate(given)
    ]
    conftest.longest_first(items)
    assert [(str(item.path), item.number) for item in items] == [("d", 4), ("d", 5), ("c", 2), ("c", 3), ("a", 0), ("b", 1)]


def steps_taken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], turn: shares.Turn) -> list[str]:
    monkeypatch.setattr(shares, "turn_of", lambda *_: turn)
    monkeypatch.setattr(sys, "argv", ["shares.py", *shares.STEPS])
    shares.main()
    return capsys.readouterr().out.split()


def test_steps_take_turns_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [shares.Turn(share, frozenset({"README.md"}), "") for share in range(3)]
    taken = [steps_taken(monkeypatch, capsys, turn) for turn in turns]
    assert sorted(step for steps in taken for step in steps) == sorted(shares.STEPS)
    changed = [shares.Turn(share, frozenset({"csrc/pool.cpp"}), "") for share in range(3)]
    assert all({"sanitize", "fuzz"} <= set(steps_taken(monkeypatch, capsys, turn)) for turn in changed)
    assert all(shares.Turn(None, frozenset(), "").takes(step) for step in shares.STEPS)


def test_make_knows_all_steps() -> None:
    lines = (ROOT / "Makefile").read_text().splitlines()
    assert [sum(" ".join(shares.STEPS) in line for line in lines)] == [2]  # of test-share and test-all
    assert all(any(line.startswith(f"{step}:") for line in lines) for step in shares.STEPS)
    assert "make test-share" in (ROOT / ".ci" / "run").read_text()
