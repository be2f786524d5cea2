"""Checkpoints: whenever a run dies, it goes on to the bit; whatever bit of a checkpoint is wrong, it is noticed; on any number of ranks."""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from idefics2_fast.training import checkpoint
from idefics2_fast.training.checkpoint import CheckpointError, Checkpoints

SCRIPT = Path(__file__).with_name("run_toy.py")
BEFORE_COMMIT = ["staging", "file write", "digest", "metadata", "manifest", "rename"]
AFTER_COMMIT = ["renamed", "pointer", "pointed", "prune", "mid-step"]
EVERY, SAVES = 4, 4  # the toy saves every 4 steps; kills fall on the fourth save

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def run(jobs: list[dict]) -> list[list[int]]:
    environment = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, json.dumps(jobs)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def steps_in(log: Path) -> list[tuple[int, str]]:
    """(step, loss bits and sample keys and fingerprint of all tensors) in the order in which the run's processes did them."""
    lines = (line.split(maxsplit=1) for line in log.read_text().splitlines() if not line.startswith("resumed"))
    return [(int(step), rest) for step, rest in lines]


def resumed_at(log: Path) -> list[int]:
    return [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("resumed")]


def whole(folder: Path) -> bool:
    """What `sha256sum --check manifest` says."""
    lines = [line.split("  ") for line in (folder / "manifest").read_text().splitlines()]
    return bool(lines) and all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for digest, name in lines)


# --- kill -9 ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs, one for each point where it is killed and taken up again, and one that meets all points in turn."""
    root = tmp_path_factory.mktemp("runs")
    points = BEFORE_COMMIT + AFTER_COMMIT
    jobs = [{"folder": "undisturbed", "steps": 72}, {"folder": "synchronous", "asynchronous": False}]
    for point in points:
        jobs += [{"folder": point, "kill": [point, SAVES], "copy": str(root / f"{point} killed")}, {"folder": point}]
    jobs += [{"folder": "all", "steps": 72, "kill": [point, 2]} for point in points] + [{"folder": "all", "steps": 72}]
    codes = run([job | {"folder": str(root / job["folder"]), "log": str(root / f"{job['folder']}.log")} for job in jobs])
    assert codes == [[-9] if "kill" in job else [0] for job in jobs]
    return root


@pytest.mark.slow
@pytest.mark.parametrize("point", BEFORE_COMMIT + AFTER_COMMIT)
def test_a_killed_run_goes_on_to_the_bit(runs: Path, point: str) -> None:
    """Losses, samples and every tensor after every step are the undisturbed run's; at most one interval is done again."""
    reference = dict(steps_in(runs / "undisturbed.log"))
    log = runs / f"{point}.log"
    committed = EVERY * (SAVES if point in AFTER_COMMIT else SAVES - 1)
    assert resumed_at(log) == [0, committed]
    steps = steps_in(log)
    assert all(reference[step] == rest for step, rest in steps)
    second = [step for step, _ in steps][-(24 - committed) :]
    assert second == list(range(committed + 1, 25))


@pytest.mark.slow
@pytest.mark.parametrize("point", BEFORE_COMMIT + AFTER_COMMIT)
def test_at_any_moment_the_pointer_and_every_checkpoint_are_whole(runs: Path, point: str) -> None:
    killed = runs / f"{point} killed"
    latest = (killed / "latest").read_text().strip()
    committed = EVERY * (SAVES if point in AFTER_COMMIT and point not in ("renamed", "pointer") else SAVES - 1)
    assert latest == f"step-{committed:08d}"
    names = list(killed.glob("step-*"))
    assert len(names) >= 2  # the one before survives until the new one is committed and pointed at
    assert all(whole(path) for path in names)


@pytest.mark.slow
def test_a_run_killed_at_every_point_in_turn_reaches_the_end(runs: Path) -> None:
    reference, steps = dict(steps_in(runs / "undisturbed.log")), steps_in(runs / "all.log")
    assert len(resumed_at(runs / "all.log")) == len(BEFORE_COMMIT + AFTER_COMMIT) + 1
    assert all(reference[step] == rest for step, rest in steps)
    assert dict(steps) == reference


@pytest.mark.slow
def test_saving_beside_the_training_changes_nothing(runs: Path) -> None:
    synchronous = dict(steps_in(runs / "synchronous.log"))
    assert synchronous == {step: rest for step, rest in steps_in(runs / "undisturbed.log") if step <= 24}


@pytest.mark.slow
def test_nothing_is_left_over(runs: Path) -> None:
    for point in BEFORE_COMMIT + AFTER_COMMIT:
        assert sorted(path.name for path in (runs / point).iterdir()) == ["latest", "step-00000020", "step-00000024"]


@pytest.mark.slow
def test_a_run_killed_100_times_at_random_moments_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Where a kill tears the log's last line, the step is logged again: every whole line is the undisturbed run's."""
    draw = random.Random(0)
    jobs = [{"folder": "whole", "steps": 800}]
    jobs += [{"folder": "killed", "steps": 800, "lines": draw.randint(1, 12), "wait": draw.uniform(0, 0.02)} for _ in range(100)]
    codes = run([job | {"folder": str(tmp_path / job["folder"]), "log": str(tmp_path / f"{job['folder']}.log")} for job in jobs])
    run([{"folder": str(tmp_path / "killed"), "log": str(tmp_path / "killed.log"), "steps": 800}])
    assert codes[1:] == 100 * [[-9]]
    reference = dict(steps_in(tmp_path / "whole.log"))
    steps = steps_in(tmp_path / "killed.log")
    assert all(reference[step] == rest for step, rest in steps)
    assert dict(steps) == reference


# --- any number of ranks ---


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 1, 2, 3, 1 ranks and no process group; and one of which rank 1 is killed in the middle of a file."""
    root = tmp_path_factory.mktemp("ranks")
    jobs = [{"folder": "moving", "world": world, "steps": 8 * (i + 1)} for i, world in enumerate([1, 2, 3, 1])]
    jobs += [{"folder": "alone", "world": 1, "steps": 32}]
    jobs += [{"folder": "lost", "world": 2, "steps": 12, "kill": ["file write", 2]}, {"folder": "lost", "world": 2, "steps": 12}]
    codes = run([job | {"folder": str(root / job["folder"]), "log": str(root / f"{job['folder']}.log")} for job in jobs])
    assert codes == [[0], [0, 0], [0, 0, 0], [0], [0], [1, -9], [0, 0]]
    return root


@pytest.mark.slow
def test_another_number_of_ranks_finds_the_same_bits(ranks: Path) -> None:
    """Shards of 15 rows and of 1 row, on 1, 2 and 3 ranks: what is loaded is bit for bit what was saved, and the samples go on."""
    last, cursor = None, 0
    for line in (ranks / "moving.log").read_text().splitlines():
        first, second, *rest = line.split()
        if first == "resumed":
            assert last is None or [second, rest[0]] == last
        else:
            last = [first, rest[1]]
            assert rest[0] == f"{cursor}-{cursor + 3}"
            cursor += 4
    assert resumed_at(ranks / "moving.log") == [0, 8, 16, 24]
    # every rank sees the whole batch here, so the mean over ranks of its gradient is the gradient but for rounding
    losses = [[float.fromhex(rest.split()[0]) for _, rest in steps_in(ranks / f"{name}.log")] for name in ("moving", "alone")]
    torch.testing.assert_close(torch.tensor(losses[0][:8]), torch.tensor(losses[1][:8]), rtol=0, atol=0)
    assert len(losses[0]) == len(losses[1]) == 32


@pytest.mark.slow
def test_a_lost_rank_costs_the_others_the_save_and_not_their_time(ranks: Path) -> None:
    """Rank 0 ends with an error instead of waiting for rank 1 (its exit code is 1), and both go on from the save before."""
    assert resumed_at(ranks / "lost.log") == [0, 4]
    assert steps_in(ranks / "lost.log")[-1][0] == 12


# --- damage ---


def state(value: float) -> dict:
    value = float(value)
    tensors = {"weight": torch.full((5, 3), value), "half": torch.full((4,), value, dtype=torch.bfloat16), "steps": torch.tensor(value)}
    groups = [{"lr": value, "betas": (value, 0.9), "params": ["weight"]}]
    return {"model": tensors, "optimizer": {"param_groups": groups, "on": True, "none": None}}


@pytest.fixture
def two(tmp_path: Path) -> Checkpoints:
    """Steps 1 and 2, whose every number is 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "run", "recipe")
    for step in (1, 2):
        checkpoints.save(step, state(step), {"cursor": step}, asynchronous=False)
    return checkpoints


def assert_loads(checkpoints: Checkpoints, step: int) -> checkpoint.Loaded:
    target = state(-1)
    loaded = checkpoints.load(target)
    assert (loaded.step, loaded.extra) == (step, {"cursor": step})
    assert str(target) == str(state(step))  # tuples as tuples, types and values
    return loaded


def test_what_is_saved_comes_back(two: Checkpoints) -> None:
    assert assert_loads(two, 2).skipped == {}
    assert sorted(path.name for path in (two.folder / "step-00000002").iterdir()) == [
        "manifest", "rng-00000.json", "run.json", "shard-00001-model-00001-of-00001.safetensors",
    ]  # fmt: skip
    assert Checkpoints(two.folder.with_name("other"), "recipe").load(state(0)) is None


def test_every_single_bit_flip_is_noticed(two: Checkpoints) -> None:
    """200 flips, as many in each file: the newest checkpoint is passed over, saying why, and the one before is loaded."""
    rng = random.Random(0)
    files = sorted((two.folder / "step-00000002").iterdir())
    for number in range(200):
        path = files[number % len(files)]
        data = path.read_bytes()
        bit = rng.randrange(8 * len(data))
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        reason = assert_loads(two, 1).skipped["step-00000002"]
        assert path.name == "manifest" or path.name in reason, (path, bit)
        path.write_bytes(data)
    assert assert_loads(two, 2).skipped == {}


def test_no_tensor_is_read_before_the_digests_agree(two: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    path = next((two.folder / "step-00000002").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    monkeypatch.setattr(checkpoint.dcp, "load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(pytest.fail.Exception):  # of step 1, which is whole
        two.load(state(0))
    shutil.rmtree(two.folder / "step-00000001")
    with pytest.raises(ValueError, match="verifies"):
        two.load(state(0))


def lose(path: Path) -> None:
    next(path.glob("*.safetensors")).unlink()


def cut(path: Path) -> None:
    os.truncate(next(path.glob("*.safetensors")), 100)


def add(path: Path) -> None:
    shutil.copy(next(path.glob("*.safetensors")), path / "shard-00002-model-00001-of-00001.safetensors")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lose, "shard-00001"),
        (cut, "shard-00001"),
        (add, "shard-00002"),
        (lambda path: (path / "manifest").unlink(), "manifest"),
        (lambda path: (path / "manifest").write_bytes(b""), "run.json"),
        (lambda path: (path / "manifest").write_bytes((path / "manifest").read_bytes() + b"\n"), "manifest"),
        (shutil.rmtree, None),
    ],
    ids=["lost file", "cut file", "foreign file", "no manifest", "empty manifest", "longer manifest", "gone"],
)
def test_damage_is_named_and_passed_over(two: Checkpoints, harm, reason: str | None, caplog: pytest.LogCaptureFixture) -> None:
    harm(two.folder / "step-00000002")
    skipped = assert_loads(two, 1).skipped
    assert reason in skipped["step-00000002"] if reason else skipped == {}
    assert reason is None or "step-00000002 is passed over" in caplog.text


def test_nothing_but_damage_is_refused(two: Checkpoints) -> None:
    """To start again from nothing would be silent loss of the run."""
    for step in (1, 2):
        cut(two.folder / f"step-{step:08d}")
    target = state(-1)
    with pytest.raises(ValueError, match=r"verifies: step-00000002: differs .*shard-00001.*; step-00000001: differs"):
        two.load(target)
    assert str(target) == str(state(-1))


def test_another_recipe_is_refused(two: Checkpoints) -> None:
    with pytest.raises(ValueError, match=r"step-00000002 was saved by recipe recipe, and this run follows another"):
        Checkpoints(two.folder, "another").load(state(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model"].pop("half"), r"model/half \['bfloat16', 4\] -> none"),
        (lambda s: s["model"].update(new=torch.zeros(2)), r"model/new none -> \['float32', 2\]"),
        (lambda s: s["model"].update(weight=torch.zeros(3, 5)), r"model/weight \['float32', 5, 3\] -> \['float32', 3, 5\]"),
        (lambda s: s["model"].update(half=torch.zeros(4)), r"model/half \['bfloat16', 4\] -> \['float32', 4\]"),
        (lambda s: s["optimizer"].pop("on"), r"other values .*optimizer/on"),
    ],
    ids=["less", "more", "shape", "dtype", "value"],
)
def test_other_tensors_are_refused(two: Checkpoints, change, message: str) -> None:
    target = state(-1)
    change(target)
    with pytest.raises(ValueError, match=message):
        two.load(target)


def test_no_pickle_is_written_or_read(two: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("unpickled"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load"))
    assert_loads(two, 2)


# --- saving ---


def test_what_is_saved_is_the_state_at_the_call(two: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save` returns while the files are not written yet, and what changes then is not in them; generators included."""
    gate, whole_save, live, extra = threading.Event(), checkpoint.dcp.save, state(3), {"cursor": 3}
    monkeypatch.setattr(checkpoint.dcp, "save", lambda *args, **kwargs: gate.wait(60) and whole_save(*args, **kwargs))
    two.save(3, live, extra)
    drawn = [torch.rand(2), random.random(), checkpoint.np.random.rand()]
    for tensor in live["model"].values():
        tensor.zero_()
    live["optimizer"]["param_groups"][0]["lr"] = extra["cursor"] = 0
    assert two.steps() == [1, 2]
    gate.set()
    two.wait()
    assert two.steps() == [2, 3]
    assert_loads(two, 3)
    assert [torch.rand(2).tolist(), random.random(), checkpoint.np.random.rand()] == [drawn[0].tolist(), *drawn[1:]]


def test_everything_is_durable_before_it_is_named(two: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then their folder, are fsynced before the rename; the folder above before the pointer; the pointer's file before its move."""
    calls, fsync, rename, replace = [], os.fsync, os.rename, os.replace

    def name(path: str | Path) -> str:
        return Path(path).name

    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(f"sync {name(os.readlink(f'/proc/self/fd/{fd}'))}"), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(f"rename {name(a)} {name(b)}"), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"replace {name(a)} {name(b)}"), replace(a, b)))
    two.save(3, state(3), {}, asynchronous=False)
    committed = calls.index("rename .aside-step-00000003 step-00000003")
    files = {path.name for path in (two.folder / "step-00000003").iterdir()}
    assert {f"sync {file}" for file in files} == set(calls[: committed - 1])
    assert calls[committed - 1] == "sync .aside-step-00000003"
    assert calls[committed + 1 :] == [
        "sync run", "sync .aside-latest", "replace .aside-latest latest", "sync run", "rename step-00000001 .old-step-00000001",
    ]  # fmt: skip


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("holder", "name", "newest"),
    [
        (HuggingFaceStorageWriter, "write_data", 2),
        (checkpoint, "write_file", 2),
        (checkpoint, "digest", 2),
        (os, "rename", 2),
        (os, "replace", 3),
        (checkpoint, "discard", 3),
    ],
    ids=["tensors", "file", "digest", "rename", "pointer", "prune"],
)
def test_a_full_disk_is_said_and_costs_no_earlier_checkpoint(
    two: Checkpoints, monkeypatch: pytest.MonkeyPatch, holder, name: str, newest: int
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(holder, name, full_disk)
        two.save(3, state(3), {"cursor": 3})
        with pytest.raises(CheckpointError, match=f"saving step 3 failed: .*No space left.*newest checkpoint in .*: step-{newest:08d}"):
            two.wait()
    assert_loads(two, newest)
    assert (two.folder / (two.folder / "latest").read_text().strip()).exists()
    two.save(4, state(4), {"cursor": 4}, asynchronous=False)
    assert_loads(two, 4)
    assert not [path.name for path in two.folder.iterdir() if path.name.startswith(".")]


def test_a_failed_save_is_raised_by_the_next(two: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "digest", full_disk)
        two.save(3, state(3), {})
        with pytest.raises(CheckpointError, match="saving step 3"):
            two.save(4, state(4), {})
    two.wait()


def test_pruning_keeps_the_newest_and_every_mth(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "recipe", keep=2, every=4)
    for step in range(1, 12):
        checkpoints.save(step, state(step), {}, asynchronous=False)
    assert checkpoints.steps() == [4, 8, 10, 11]


def test_rolling_back_forgets_what_came_after(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "recipe", keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"cursor": step}, asynchronous=False)
    assert checkpoints.load(state(0), before=1) is None
    assert checkpoints.steps() == [1, 2, 3]
    assert checkpoints.load(state(0), before=3).step == 2
    assert (checkpoints.steps(), (tmp_path / "latest").read_text()) == ([1, 2], "step-00000002\n")


def test_a_save_replaces_damage_of_its_step_and_outdates_later_steps(two: Checkpoints) -> None:
    """After a fall back to step 0, say, with another interval: a damaged later checkpoint must not push out the good ones."""
    cut(two.folder / "step-00000002")
    assert_loads(two, 1)
    two.save(2, state(2), {"cursor": 2}, asynchronous=False)
    assert assert_loads(two, 2).skipped == {}
    cut(two.folder / "step-00000002")
    two.save(1, state(1), {"cursor": 1}, asynchronous=False)
    assert two.steps() == [1]
    assert assert_loads(two, 1).skipped == {}


def test_large_states_go_to_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 64)
    checkpoints = Checkpoints(tmp_path, "recipe")
    checkpoints.save(2, state(2), {"cursor": 2}, asynchronous=False)
    assert len(list((tmp_path / "step-00000002").glob("*.safetensors"))) == 2
    assert_loads(checkpoints, 2)


@pytest.mark.parametrize(("options", "message"), [({"keep": 0}, "keep is 0"), ({"every": 0}, "every is 0")])
def test_wrong_options_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path, "recipe", **options)


@pytest.fixture(autouse=True)
def _generators() -> Iterator[None]:
    """Loading sets this process's random generators."""
    before = checkpoint.random_state()
    yield
    checkpoint.set_random_state(before)


# --- a step that is saved again ---


class Killed(BaseException):
    pass


@pytest.mark.parametrize("swaps", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("call", range(8))
def test_a_step_saved_again_is_there_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool, call: int) -> None:
    """The only checkpoint is saved again and the process dies before any call that moves a name: the old or the new one loads."""
    first = Checkpoints(tmp_path, "recipe", keep=1)
    first.save(1, state(1), {"cursor": 1}, asynchronous=False)
    calls = 0

    def then(whole):
        def counted(*arguments, **others):
            nonlocal calls
            calls += 1
            if swaps:
                assert whole_in(tmp_path)
            if calls > call:
                raise Killed
            return whole(*arguments, **others)

        return counted

    if not swaps:
        monkeypatch.setattr(checkpoint, "exchange", lambda *_: False)
    with monkeypatch.context() as patched:
        for holder, name in ((os, "rename"), (os, "replace"), (checkpoint, "remove"), (checkpoint, "sync")):
            patched.setattr(holder, name, then(getattr(holder, name)))
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)  # nothing is tidied after a death
        try:
            first.save(1, state(1), {"cursor": 1, "again": True}, asynchronous=False)
        except Killed:
            pass
    again = Checkpoints(tmp_path, "recipe", keep=1)
    target = state(-1)
    loaded = again.load(target)
    assert loaded.step == 1
    assert loaded.extra in ({"cursor": 1}, {"cursor": 1, "again": True})
    assert str(target) == str(state(1))
    again.save(2, state(2), {"cursor": 2}, asynchronous=False)
    assert_loads(again, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002"]


def whole_in(folder: Path) -> bool:
    return whole(folder / (folder / "latest").read_text().strip())


def save_more(checkpoints: Checkpoints) -> list[int]:
    """Saves steps 3 and 4, as the run goes on."""
    assert_loads(checkpoints, 2)
    for step in (3, 4):
        checkpoints.save(step, state(step), {"cursor": step}, asynchronous=False)
    return checkpoints.steps()


@pytest.mark.parametrize("name", ["step-1", "step-000000001", "step-00000002 (copy)", "step-"])
def test_a_copy_of_a_checkpoint_under_another_name_is_left_alone(two: Checkpoints, name: str) -> None:
    shutil.copytree(two.folder / "step-00000001", two.folder / name)
    assert save_more(two) == [3, 4]
    assert whole(two.folder / name)


def test_a_checkpoint_that_is_a_link_can_be_pruned(two: Checkpoints, tmp_path: Path) -> None:
    """Moved to another disk, for example: the link goes, what it leads to stays."""
    (two.folder / "step-00000001").rename(tmp_path / "moved")
    (two.folder / "step-00000001").symlink_to(tmp_path / "moved")
    assert save_more(two) == [3, 4]
    assert whole(tmp_path / "moved")
    assert not list(two.folder.glob(".*"))


def test_a_checkpoint_under_the_name_of_another_step_is_refused(two: Checkpoints) -> None:
    """The run would go on from a step that it has not reached."""
    (two.folder / "step-00000001").rename(two.folder / "step-00000100")
    with pytest.raises(ValueError, match="step-00000100 holds the state after step 1, expected the name step-00000001"):
        two.load(state(0))
    assert two.steps() == [2, 100]
