"""The guard: one rank's fault is every rank's; a spike is told from noise; a run that cannot go on says why; signals wait for a border."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable

import pytest

from idefics2_fast.training.guard import REQUEUE, Action, Guard, GuardError, Stop

NAN, INF = float("nan"), float("inf")


def feed(guard: Guard, losses: list[float], start: int = 0) -> list[Action]:
    return [guard.inspect(start + i, loss, 1.0, [f"s{start + i}"]).action for i, loss in enumerate(losses)]


def noise(count: int, seed: int = 0, middle: float = 2.0, width: float = 0.1) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(middle, width) for _ in range(count)]


# --- non-finite ---


@pytest.mark.parametrize(
    ("loss", "grad_norm", "what"), [(NAN, 1.0, "loss"), (INF, 1.0, "loss"), (2.0, NAN, "gradient"), (2.0, -INF, "gradient")]
)
def test_a_step_that_is_not_finite_is_skipped(loss: float, grad_norm: float, what: str, caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard()
    feed(guard, noise(20))
    before = list(guard.losses)
    verdict = guard.inspect(20, loss, grad_norm, ["cat", "dog"])
    assert (verdict.action, verdict.sample_keys) == (Action.SKIP, ("cat", "dog"))
    assert verdict.reason == f"non-finite {what} on rank 0"
    assert list(guard.losses) == before
    assert f"step 20: non-finite {what} on rank 0; samples cat, dog" in caplog.text


def test_k_skipped_steps_in_a_row_end_the_run_with_a_report() -> None:
    guard = Guard(skip_at_most=3)
    assert feed(guard, [1.0, NAN, NAN, 1.0, NAN, NAN]) == [Action(a) for a in ("proceed", "skip", "skip", "proceed", "skip", "skip")]
    with pytest.raises(GuardError) as caught:
        guard.inspect(6, INF, NAN, ["s6"])
    assert str(caught.value).splitlines() == [
        "3 steps in a row were skipped, and the run stops:",
        "  step 4: non-finite loss on rank 0; samples s4",
        "  step 5: non-finite loss on rank 0; samples s5",
        "  step 6: non-finite loss on rank 0, gradient on rank 0; samples s6",
    ]


# --- spikes ---


def test_a_spike_rolls_back_and_stays_out_of_the_median() -> None:
    guard = Guard()
    feed(guard, noise(30))
    for step in (30, 31):
        verdict = guard.inspect(step, 4.5, 1.0, ["a"])
        assert (verdict.action, verdict.sample_keys) == (Action.ROLL_BACK, ("a",))
        assert verdict.reason == f"loss 4.5 where the median of the last 30 is {statistics.median(noise(30)):.6g}"
    assert 4.5 not in guard.losses
    assert guard.inspect(32, 2.1, 1.0, ["b"]).action is Action.PROCEED


@pytest.mark.parametrize(
    "losses",
    [
        [*noise(15), 50.0],  # nothing to compare with yet: a quarter of the window is 16
        [*[2.0] * 64, 3.9],  # a flat curve: infinitely many deviations, but less than twice the median
        [*noise(64, width=0.8), 5.0],  # a noisy curve: more than twice the median, but few deviations
        [10 * 0.99**i for i in range(300)],
        [*noise(64), 0.001],  # downwards
    ],
    ids=["early", "flat", "noisy", "falling", "low"],
)
def test_what_is_no_spike(losses: list[float]) -> None:
    assert set(feed(Guard(), losses)) == {Action.PROCEED}


def test_without_a_factor_nothing_is_a_spike() -> None:
    assert set(feed(Guard(factor=INF), [2.5] * 40 + [50.0] + [0.0] * 80 + [1.0])) == {Action.PROCEED}


@pytest.mark.parametrize("seed", range(5))
def test_the_rule_is_the_formula(seed: int) -> None:
    rng = random.Random(seed)
    losses = [rng.lognormvariate(0, 0.5) * (5 if rng.random() < 0.1 else 1) for _ in range(200)]
    guard, accepted = Guard(window=16, sigmas=3, factor=1.5, rollbacks_at_most=1000), []
    for step, loss in enumerate(losses):
        last = accepted[-16:]
        expected = False
        if len(last) >= 4:
            middle = statistics.median(last)
            deviation = 1.4826 * statistics.median([abs(x - middle) for x in last])
            expected = loss > middle + 3 * deviation and loss > 1.5 * middle
        assert (guard.inspect(step, loss, 1.0, []).action is Action.ROLL_BACK) == expected
        if not expected:
            accepted.append(loss)
    assert len(accepted) < 200


def test_rollbacks_that_do_not_help_end_the_run() -> None:
    guard = Guard(window=16, rollbacks_at_most=2)
    feed(guard, noise(16))
    saved = guard.state_dict()
    for _ in range(2):
        assert guard.inspect(16, 9.0, 1.0, []).action is Action.ROLL_BACK
        guard.load_state_dict(saved)  # the trainer is back at the checkpoint, whose guard had seen no rollback
    with pytest.raises(GuardError, match=r"step 16: loss 9 .*after 2 rollbacks that did not help; samples x"):
        guard.inspect(16, 9.0, 1.0, ["x"])


def test_rollbacks_are_forgiven_after_a_window_of_good_steps() -> None:
    guard = Guard(window=16, rollbacks_at_most=1)
    for round in range(3):
        assert feed(guard, [*noise(16, seed=round), 9.0])[-1] is Action.ROLL_BACK


def test_a_resumed_guard_decides_alike() -> None:
    rng = random.Random(1)
    losses = [NAN if rng.random() < 0.2 else 20.0 if rng.random() < 0.1 else rng.gauss(2, 0.1) for _ in range(120)]
    straight, resumed = Guard(window=16, rollbacks_at_most=99), Guard(window=16, rollbacks_at_most=99)
    first = feed(straight, losses[:60])
    assert set(first) == set(Action)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    assert feed(resumed, losses[60:], 60) == feed(straight, losses[60:], 60)
    assert resumed.state_dict() == straight.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_at_most": 0}, "skip_at_most is 0"),
        ({"window": 3}, "window is 3"),
        ({"sigmas": 0}, "sigmas is 0"),
        ({"factor": 1}, "factor 1,"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guard(**options)


# --- signals ---


@pytest.fixture
def heard() -> Callable[[], list[int]]:
    """Handlers of somebody else, who was there before."""
    numbers: list[int] = []
    before = {number: signal.signal(number, lambda n, _: numbers.append(n)) for number in (signal.SIGTERM, signal.SIGINT)}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, REQUEUE), (signal.SIGINT, 130)])
def test_a_signal_is_a_wish(number: int, code: int, heard: list[int]) -> None:
    others = signal.getsignal(number)
    with Stop() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested()
        assert stop.requested()
        assert stop.exit_code == code
        assert heard == []
        os.kill(os.getpid(), number)  # the second is no longer ours
        assert heard == [number]
    assert signal.getsignal(number) is others


def test_handlers_are_given_back(heard: list[int]) -> None:
    others = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Stop():
        assert not {signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} & set(others)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == others


def test_sigterm_ends_a_process_at_a_border() -> None:
    code = """
import sys, time
from idefics2_fast.training.guard import Stop
with Stop() as stop:
    for step in range(1000):
        print("begin", step, flush=True)
        time.sleep(0.3)
        print("end", step, flush=True)
        if stop.requested():
            sys.exit(stop.exit_code)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        lines = [child.stdout.readline() for _ in range(3)]
        child.send_signal(signal.SIGTERM)
        rest, _ = child.communicate(timeout=60)
    assert [*lines, *rest.splitlines(keepends=True)] == ["begin 0\n", "end 0\n", "begin 1\n", "end 1\n"]
    assert child.returncode == REQUEUE == 75


# --- ranks ---

RANKS = """
import json, logging, os, signal, sys, time
import torch.distributed as dist
from idefics2_fast.training.guard import Guard, GuardError, Stop

def rank(number):
    dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 2), rank=number, world_size=2)
    guard, out = Guard(window=8, skip_at_most=3), []
    def step(i, loss, grad=1.0):
        verdict = guard.inspect(i, loss, grad, [f"r{number}s{i}"])
        out.append([verdict.action.value, verdict.reason, list(verdict.sample_keys)])
    nan = float("nan")
    for i in range(8):
        step(i, 2.0 + number + 0.01 * i)
    step(8, nan if number == 1 else 2.0)
    step(9, 2.0, nan if number == 0 else 1.0)
    step(10, 2.0 + number)
    step(11, 2.0 if number else 12.0)
    out.append(guard.state_dict())
    with Stop() as stop:
        out.append(stop.requested())
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        out += [stop.requested(), stop.exit_code]
    try:
        for i in range(12, 15):
            step(i, nan if number == i % 2 else 2.0)
    except GuardError as error:
        out.append(str(error))
    open(f"{sys.argv[1]}.{number}", "w").write(json.dumps(out))

pids = []
for number in range(2):
    pids.append(os.fork())
    if pids[-1] == 0:
        rank(number)
        os._exit(0)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
"""


@pytest.mark.slow
def test_ranks_decide_together(tmp_path) -> None:
    """What one rank alone sees, NaN, a spike, a signal, all do; and all know whose samples they were."""
    store = tmp_path / "store"
    child = subprocess.run([sys.executable, "-c", RANKS, store], capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 0, child.stderr
    first, second = (json.loads((tmp_path / f"store.{number}").read_text()) for number in range(2))
    assert first == second
    assert first[:8] == [["proceed", "", []]] * 8
    assert first[8] == ["skip", "non-finite loss on rank 1", ["r1s8"]]
    assert first[9] == ["skip", "non-finite gradient on rank 0", ["r0s9"]]
    assert first[10][0] == "proceed"
    assert first[11][0] == "roll back"
    assert first[11][2] == ["r0s11", "r1s11"]
    assert first[12]["losses"][0] == pytest.approx(2.51)  # the mean of both, of the second step: the window holds 8
    assert first[13:18] == [
        False, True, REQUEUE, ["skip", "non-finite loss on rank 0", ["r0s12"]], ["skip", "non-finite loss on rank 1", ["r1s13"]],
    ]  # fmt: skip
    assert first[18].startswith("3 steps in a row")
