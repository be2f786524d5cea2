"""Telemetry: a line a step and no step twice, whatever happened in between; rates that are what they say; sinks asked for by name."""

import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from idefics2_fast.training import telemetry
from idefics2_fast.training.telemetry import Telemetry

NUMBERS = {"lr": 1e-4, "grad_norm": 0.5, "tokens": 1000, "images": 4, "flops": 2e12}


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(telemetry.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def record(run: Telemetry, clock: Clock, *steps: int, seconds: float = 2.0, **changes: float) -> dict:
    for step in steps:
        clock.now += seconds
        last = run.step(step, **({"loss": 3.0 - step / 10} | NUMBERS | changes))
    return last


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_a_line_says(tmp_path: Path, clock: Clock) -> None:
    with Telemetry(tmp_path / "run", steps=10, peak_flops=4e12) as run:
        with run.waiting():
            clock.now += 0.5
        written = record(run, clock, 1, seconds=1.5, z_loss=0.25)
        clock.now += 1
        with run.waiting():
            clock.now += 1
        record(run, clock, 2, seconds=2)
    first, second = lines(tmp_path / "run")
    assert first == written
    assert {k: v for k, v in first.items() if k != "memory_bytes"} == {
        "step": 1, "loss": 2.9, "lr": 1e-4, "grad_norm": 0.5, "tokens": 1000, "images": 4, "seconds": 2.0,
        "tokens_per_s": 500.0, "images_per_s": 2.0, "data_wait": 0.25, "mfu": 0.25, "z_loss": 0.25,
    }  # fmt: skip
    assert (second["seconds"], second["data_wait"], second["mfu"]) == (4.0, 0.25, 0.125)  # waiting is counted once
    assert 2**26 < first["memory_bytes"] < 2**40


def test_without_a_peak_there_is_no_mfu(tmp_path: Path, clock: Clock) -> None:
    with Telemetry(tmp_path, steps=10) as run:
        assert "mfu" not in record(run, clock, 1)


def test_a_line_is_on_disk_when_the_step_is_done(tmp_path: Path) -> None:
    """A process that is killed after step 3 has left three lines."""
    code = f"""
import os, signal
from idefics2_fast.training.telemetry import Telemetry
run = Telemetry({str(tmp_path)!r}, steps=9)
for step in (1, 2, 3):
    run.step(step, loss=1.0, lr=1.0, grad_norm=1.0, tokens=1, images=1, flops=1.0)
os.kill(os.getpid(), signal.SIGKILL)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == -9
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert child.stderr == ""  # a bar is for terminals


@pytest.mark.parametrize("tail", ["", '{"step": 6, "los', '{"step": 6, "loss"\n', "\0\0\0\n"], ids=["whole", "torn", "torn line", "zeros"])
def test_a_resumed_run_has_each_step_once(tmp_path: Path, clock: Clock, tail: str) -> None:
    with Telemetry(tmp_path, steps=10) as run:
        record(run, clock, 1, 2, 3, 4, 5)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail)
    with Telemetry(tmp_path, steps=10, step=3) as run:
        record(run, clock, 4, 5, 6, loss=-1.0)
    assert [(line["step"], line["loss"] == -1.0) for line in lines(tmp_path)] == [(step, step > 3) for step in range(1, 7)]


def test_a_line_without_its_end_is_not_written_on(tmp_path: Path, clock: Clock) -> None:
    with Telemetry(tmp_path, steps=10) as run:
        record(run, clock, 1, 2, 3)
    os.truncate(tmp_path / "metrics.jsonl", (tmp_path / "metrics.jsonl").stat().st_size - 1)
    with Telemetry(tmp_path, steps=10, step=3) as run:
        record(run, clock, 4)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 4]


def test_a_run_that_loses_nothing_keeps_everything(tmp_path: Path, clock: Clock) -> None:
    with Telemetry(tmp_path, steps=10) as run:
        record(run, clock, 1, 2, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    Telemetry(tmp_path, steps=10, step=3).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    Telemetry(tmp_path, steps=10).close()  # begun anew
    assert lines(tmp_path) == []


def test_rolling_back_cuts_the_lines_and_not_the_events(tmp_path: Path, clock: Clock) -> None:
    with Telemetry(tmp_path, steps=10) as run:
        record(run, clock, 1, 2, 3, 4)
        run.event(5, "spike", samples=["cat"])
        clock.now += 100
        run.rewind(2)
        assert record(run, clock, 3)["seconds"] == 2.0  # loading is no part of a step
        record(run, clock, 4, 5)
        run.event(5, "skip", loss=float("nan"))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["step"], e["event"], e.get("samples")) for e in events] == [(5, "spike", ["cat"]), (5, "skip", None)]
    assert events[1]["loss"] is None


def test_going_back_without_saying_so_is_refused(tmp_path: Path, clock: Clock) -> None:
    with Telemetry(tmp_path, steps=10, step=3) as run, pytest.raises(AssertionError, match="step 3 after step 3"):
        record(run, clock, 3)


def test_what_is_not_finite_is_null(tmp_path: Path, clock: Clock) -> None:
    with Telemetry(tmp_path, steps=10) as run:
        record(run, clock, 1, loss=float("nan"), grad_norm=float("inf"))
    assert (lines(tmp_path)[0]["loss"], lines(tmp_path)[0]["grad_norm"]) == (None, None)


def test_other_ranks_write_nothing(tmp_path: Path, clock: Clock) -> None:
    pytest.importorskip("tensorboard")
    with Telemetry(tmp_path / "run", steps=10, rank=1, sinks=["tensorboard"]) as run:
        assert record(run, clock, 1)["tokens_per_s"] == 500.0
        run.event(1, "skip")
        run.rewind(0)
    assert not (tmp_path / "run").exists()


# --- the bar ---


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "rank", "seen"), [(Terminal, 0, True), (io.StringIO, 0, False), (Terminal, 1, False)])
def test_the_bar_is_for_rank_0_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: type, rank: int, seen: bool) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    with Telemetry(tmp_path, steps=10, step=3, peak_flops=1e15, rank=rank) as run:
        run.step(4, loss=1.25, **NUMBERS)
    shown = sys.stderr.getvalue()
    assert bool(shown) == seen
    if seen:
        assert "4/10" in shown
        assert "loss 1.2500" in shown
        assert "MFU" in shown


# --- sinks ---


def test_tensorboard_gets_each_step_once(tmp_path: Path, clock: Clock) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Telemetry(tmp_path, steps=10, sinks=["tensorboard"]) as run:
        record(run, clock, 1, 2, 3)
        run.rewind(2)
        record(run, clock, 3, 4)
    with Telemetry(tmp_path, steps=10, step=3, sinks=["tensorboard"]) as run:
        record(run, clock, 4, 5, loss=7.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "images_per_s", "data_wait", "memory_bytes"} <= set(events.Tags()["scalars"])
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [(1, 2.9), (2, 2.8), (3, 2.7), (4, 7.0), (5, 7.0)]


class Run:
    """Stands in for what `init` of trackio and of wandb returns; neither is needed to test what they are told."""

    def __init__(self, **arguments: object) -> None:
        self.arguments, self.calls = arguments, []

    def log(self, values: dict, step: int | None = None) -> None:
        self.calls.append((values.get("step", step), values["loss"]))

    def define_metric(self, name: str, step_metric: str) -> None:
        self.calls.append((name, step_metric))

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_sink_is_told_every_step(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module, runs = types.ModuleType(name), []
    module.init = lambda **arguments: (runs.append(Run(**arguments)), runs[-1])[1]
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(telemetry, "find_spec", lambda name: object())
    for step in (0, 2):
        with Telemetry(tmp_path / "a", steps=10, step=step, sinks=[name], config={"seed": 1}) as run:
            record(run, clock, step + 1, step + 2)
    assert [run.calls[-3:] for run in runs] == [[(1, 2.9), (2, 2.8), "finish"], [(3, 2.7), (4, 2.6), "finish"]]
    first, second = (run.arguments for run in runs)
    assert first == second  # the same run, taken up again
    assert (first["config"], first["resume"]) == ({"seed": 1}, "allow")
    assert first["name"].startswith("a-")
    assert (name == "wandb") == (runs[0].calls[0] == ("*", "step"))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="logging to wandb needs the package wandb, which is not installed: pip install wandb"):
        Telemetry(tmp_path / "run", steps=1, sinks=["wandb"], rank=1)
    assert not (tmp_path / "run").exists()


def test_an_unknown_sink_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'mlflow', expected tensorboard, trackio, wandb"):
        Telemetry(tmp_path, steps=1, sinks=["mlflow"])
