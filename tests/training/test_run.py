"""What happens around the steps of a run: resuming, refusals, signals, full disks. A step's arithmetic is left out."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from support.checkpoints import make_format_1
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from idefics2_fast.training import Recipe, checkpoint, fit, instruct
from idefics2_fast.training import run as run_module
from idefics2_fast.training.checkpoint import CheckpointError
from idefics2_fast.training.lock import run_lock
from idefics2_fast.training.planning import Planner
from idefics2_fast.training.sources import JsonLines
from idefics2_fast.training.telemetry import Lines
from idefics2_fast.training.trainer import Losses, Trainer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def recipe_of(corpus: Path, out: Path, **changes) -> Recipe:
    settings = {"steps": 2, "tokens": 300, "patches": 400, "packs": 2, "rank": 2, "targets": ("text",), "trained": (), "warmup": 0}
    settings |= {"dtype": "float32", "save_every": 1, "keep": 9}
    return instruct(corpus / "model", corpus / "data.jsonl", out, **settings | changes)


@pytest.fixture
def keys(monkeypatch) -> list[tuple[str, ...]]:
    """The samples of each step, which computes nothing."""
    seen: list[tuple[str, ...]] = []

    def accumulate(self, batches, step):
        seen.append(tuple(key for batch in batches for key in batch.sample_keys))
        return Losses(1.0, 1.0, 1.0, trained=1, images=0, flops=1.0)

    monkeypatch.setattr(Trainer, "accumulate", accumulate)
    return seen


def events(out: Path) -> list[str]:
    path = out / "events.jsonl"
    return [json.loads(line)["reason"] for line in path.read_text().splitlines()] if path.exists() else []


def run_json(out: Path, step: int) -> dict:
    return json.loads((out / "checkpoints" / f"step-{step:08d}" / "run.json").read_text())


# --- resuming ---


@pytest.mark.slow
def test_fit_goes_on_with_more_steps_and_from_format_1(corpus, tmp_path, keys):
    fit(recipe_of(corpus, tmp_path / "whole", steps=4))
    expected = keys.copy()
    keys.clear()
    out = tmp_path / "broken"
    fit(recipe_of(corpus, out, steps=2))
    make_format_1(out / "checkpoints" / "step-00000002")
    fit(recipe_of(corpus, out, steps=3))
    assert len(events(out)) == 2
    assert "the checkpoint is of format 1" in events(out)[0]
    assert events(out)[1] == "3 steps, and 2 before; the linear schedule is drawn over them from here on"
    assert run_json(out, 3)["format"] == 2
    assert run_json(out, 3)["identity"] == run_json(tmp_path / "whole", 3)["identity"] | {
        "recipe": run_json(tmp_path / "whole", 3)["identity"]["recipe"] | {"steps": 3}
    }
    fit(recipe_of(corpus, out, steps=4))
    assert keys == expected
    assert [event[:7] for event in events(out)[2:]] == ["4 steps"]  # what is recorded now is said once
    with pytest.raises(ValueError, match="steps is 3, and the run in .* has done 4: expected as many or more"):
        fit(recipe_of(corpus, out, steps=3))
    assert json.loads((out / "recipe.json").read_text())["steps"] == 4


@pytest.mark.slow
def test_fit_goes_on_with_other_libraries_and_names_them(corpus, tmp_path, keys, monkeypatch):
    now, said = run_module.libraries(), "pillow 0.1, and 0.0 before: steps from here on need not have the bits of the run so far"
    for pillow, steps in (("0.0", 1), ("0.1", 2), ("0.1", 3)):
        monkeypatch.setattr(run_module, "libraries", lambda pillow=pillow: now | {"pillow": pillow})
        fit(recipe_of(corpus, tmp_path, steps=steps))
    assert [reason for reason in events(tmp_path) if "pillow" in reason] == [said]


@pytest.mark.slow
def test_fit_refuses_other_inputs_and_names_them(corpus, tmp_path, keys):
    shutil.copytree(corpus, tmp_path / "corpus")
    here = tmp_path / "corpus"
    out = tmp_path / "out"
    fit(recipe_of(corpus, out, steps=1))
    assert fit(recipe_of(here, out, steps=1)).steps == 1  # moved
    config = json.loads((here / "model" / "config.json").read_text())
    config["perceiver_config"]["rms_norm_eps"] = 1e-3
    (here / "model" / "config.json").write_text(json.dumps(config))
    rows = (here / "data.jsonl").read_text()
    (here / "data.jsonl").write_text(rows.replace('"assistant": "', '"assistant": "x', 1))
    before = (out / "recipe.json").read_text()
    named = "belongs to another run: data: data.jsonl changed .*; model: perceiver.rms_norm_eps is 0.001 and was"
    with pytest.raises(ValueError, match=named):
        fit(recipe_of(here, out, steps=2))
    assert (out / "recipe.json").read_text() == before
    with pytest.raises(ValueError, match=r"the recipe's learning_rate is 0\.5 and was 0\.0001"):
        fit(recipe_of(corpus, out, steps=2, learning_rate=0.5))


def test_fit_refuses_a_folder_in_use(corpus, tmp_path, keys):
    with run_lock(tmp_path), pytest.raises(ValueError, match=f"in use by the run of process {os.getpid()} on"):
        fit(recipe_of(corpus, tmp_path))
    assert keys == []
    fit(recipe_of(corpus, tmp_path, steps=1))
    assert (tmp_path / "lock").read_text() == ""


# --- signals ---


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Set when the test is over, so that no thread stays."""
    event = threading.Event()
    yield event
    event.set()


def signal_soon(number: int, once: threading.Event) -> None:
    def send() -> None:
        once.wait(60)
        time.sleep(0.3)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_fit_hears_a_signal_while_it_waits_for_data(corpus, tmp_path, keys, monkeypatch, gate, number, code):
    """The data of a later step never comes; what is done is saved, and the run goes on behind it."""
    fit(recipe_of(corpus, tmp_path / "whole", steps=5, save_every=9))
    expected = keys.copy()
    keys.clear()
    plan, planned, held_up = Planner.__call__, [], threading.Event()

    def slow(self, *arguments):
        planned.append(1)
        if len(planned) > 120:
            held_up.set()
            gate.wait()
        return plan(self, *arguments)

    monkeypatch.setattr(Planner, "__call__", slow)
    signal_soon(number, held_up)
    recipe = recipe_of(corpus, tmp_path / "broken", steps=100, save_every=1000, schedule="constant", workers=1)
    result = fit(recipe)
    assert result.exit_code == code
    assert 0 < result.steps == len(keys) < 100
    assert (tmp_path / "broken" / "checkpoints" / "latest").read_text() == f"step-{result.steps:08d}\n"
    monkeypatch.setattr(Planner, "__call__", plan)
    fit(recipe_of(corpus, tmp_path / "broken", steps=result.steps + 3, schedule="constant"))
    length = min(len(keys), len(expected))
    assert keys[:length] == expected[:length]


def test_fit_hears_a_signal_while_it_starts(corpus, tmp_path, keys, monkeypatch, gate):
    reading = threading.Event()
    monkeypatch.setattr(JsonLines, "read", lambda self, row: (reading.set(), gate.wait()))
    signal_soon(signal.SIGTERM, reading)
    result = fit(recipe_of(corpus, tmp_path))
    assert (result.steps, result.exit_code, keys) == (0, 75, [])
    assert math.isnan(result.loss)


@pytest.mark.slow
def test_fit_hears_a_signal_while_it_saves_and_saves_once(corpus, tmp_path, keys, monkeypatch):
    save = checkpoint.dcp.save
    saved = []

    def signalled(*arguments, **others):
        saved.append(1)
        if len(saved) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(*arguments, **others)

    monkeypatch.setattr(checkpoint.dcp, "save", signalled)
    result = fit(recipe_of(corpus, tmp_path, steps=50))
    assert result.exit_code == 75
    assert len(saved) == len(list((tmp_path / "checkpoints").glob("step-*"))) == result.steps < 50


@pytest.mark.slow
def test_fit_hears_a_signal_while_it_reports(corpus, tmp_path, keys, monkeypatch):
    monkeypatch.setattr(run_module, "write_report", lambda *_: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60)))
    result = fit(recipe_of(corpus, tmp_path))
    assert (result.steps, result.exit_code) == (2, 75)
    assert (tmp_path / "adapter").exists()


# --- full disks ---


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
def test_fit_stops_where_a_checkpoint_finds_no_room(corpus, tmp_path, keys, monkeypatch):
    fit(recipe_of(corpus, tmp_path, steps=1))
    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", no_room)
    with pytest.raises(CheckpointError, match="saving step 2 failed: .*No space left.*: step-00000001") as raised:
        fit(recipe_of(corpus, tmp_path, steps=4))
    assert raised.value.full
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]
    monkeypatch.undo()


@pytest.mark.slow
def test_fit_waits_for_room_where_it_is_told_to(corpus, tmp_path, keys, monkeypatch):
    write, tried = HuggingFaceStorageWriter.write_data, []

    def full_for_a_while(*arguments):
        tried.append(1)
        return no_room() if len(tried) in (2, 3) else write(*arguments)

    monkeypatch.setattr(run_module, "RETRY", 0.05)
    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full_for_a_while)
    assert fit(recipe_of(corpus, tmp_path, steps=3), wait_for_room=True).steps == 3
    assert run_json(tmp_path, 3)["step"] == 3
    assert len(events(tmp_path)) == 2
    assert all("No space left" in reason and reason.endswith("; the run waits for room") for reason in events(tmp_path))
    assert len(keys) == 3


@pytest.mark.slow
def test_fit_goes_on_where_records_find_no_room(corpus, tmp_path, keys, monkeypatch):
    append = run_module.Telemetry.step
    from idefics2_fast.training import telemetry

    append_to = telemetry.append_to

    def step(self, number, **others):
        monkeypatch.setattr(telemetry, "append_to", no_room if number == 1 else append_to)
        return append(self, number, **others)

    monkeypatch.setattr(run_module.Telemetry, "step", step)
    fit(recipe_of(corpus, tmp_path, steps=2))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


@pytest.mark.slow
def test_recipe_json_is_never_torn(corpus, tmp_path, keys, monkeypatch):
    fit(recipe_of(corpus, tmp_path, steps=1))
    before = (tmp_path / "recipe.json").read_text()
    assert json.loads(before)["steps"] == asdict(recipe_of(corpus, tmp_path, steps=1))["steps"]
    monkeypatch.setattr(checkpoint, "write_file", no_room)
    with pytest.raises(OSError, match="No space left"):
        fit(recipe_of(corpus, tmp_path, steps=2))
    assert (tmp_path / "recipe.json").read_text() == before


def test_lines_costs_a_torn_line_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n5\n{"step": null}\n{"step": 4}\n{"step": 5}\n{"st')
    Lines(path).cut_back(4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3, 4]
    path.write_bytes(b'{"step": 1}\n{"st')
    Lines(path).append({"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"st\n{"step": 2}\n'
