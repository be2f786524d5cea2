"""The trainer's command line: flags from the recipe, every mistake one line and exit code 2, bad rows by file and line."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from idefics2_fast import cli
from idefics2_fast.training import Fitted, run
from idefics2_fast.training import __main__ as command
from idefics2_fast.training.checkpoint import CheckpointError
from idefics2_fast.training.guard import REQUEUE, GuardError
from idefics2_fast.training.recipe import Recipe, instruct

PLACES = ["--model", "m", "--data", "d.jsonl", "--out", "o"]


@pytest.fixture
def fitted(monkeypatch) -> list[Recipe]:
    """The recipes that `fit` is asked for; it does nothing."""
    recipes = []
    monkeypatch.setattr(run, "fit", lambda recipe: (recipes.append(recipe), Fitted(3, 1.5, Path("weights")))[1])
    return recipes


def settings() -> list[str]:
    """Every field as a flag, with a value that is not its default."""
    others = {
        "adapter": "lora",
        "schedule": "cosine",
        "dtype": "float32",
        "checkpointing": "full",
        "targets": "text",
        "trained": "vision,head",
    }
    others |= {"betas": "0.8,0.9", "log_to": "tensorboard,wandb"}
    flags = []
    for entry in fields(Recipe):
        flag = f"--{entry.name.replace('_', '-')}"
        if entry.name in ("model", "data", "out"):
            continue
        if entry.type == "bool":
            flags.append(flag if not entry.default else flag.replace("--", "--no-"))
        else:
            flags += [flag, others[entry.name] if entry.name in others else str(entry.default + (1 if entry.type == "int" else 0.25))]
    return flags


def test_every_field_is_a_flag(fitted):
    assert command.main(["instruct", *PLACES, *settings()]) == 0
    (recipe,) = fitted
    for entry in fields(Recipe):
        assert getattr(recipe, entry.name) != entry.default, entry.name
        assert type(getattr(recipe, entry.name)) is type(entry.default), entry.name
    assert (recipe.betas, recipe.targets, recipe.trained) == ((0.8, 0.9), ("text",), ("vision", "head"))


def test_without_flags_it_is_the_recipe(fitted, capsys):
    assert command.main(["instruct", *PLACES]) == 0
    assert fitted == [instruct("m", "d.jsonl", "o")]
    assert "3 steps, loss 1.5000; weights" in capsys.readouterr().out


def test_a_run_that_had_ended_says_so(monkeypatch, capsys):
    monkeypatch.setattr(run, "fit", lambda recipe: Fitted(3, float("nan"), Path("weights")))
    assert command.main(["instruct", *PLACES]) == 0
    assert "3 steps, there was nothing left to do; weights" in capsys.readouterr().out


def test_it_is_a_command_of_idefics2_fast(fitted, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, command.__name__)  # runpy warns of modules that were imported before
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "instruct", *PLACES, "--rank", "3", "--trained", ""])
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "instruct", "--help"])
    assert "usage: idefics2-fast train instruct" in capsys.readouterr().out
    assert [recipe.trained for recipe in fitted] == [()]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "RECIPE"),
        (["instruckt"], "instruckt"),
        (["instruct"], "--model, --data, --out"),
        (["instruct", *PLACES, "--learning-rat", "1"], "--learning-rat"),
        (["instruct", *PLACES, "--rank", "many"], "--rank: invalid int value: 'many'"),
        (["instruct", *PLACES, "--betas", "0.9"], "betas is (0.9,)"),
        (["instruct", *PLACES, "--betas", "x,y"], "--betas: 'x,y' is not A,B: expected each a float"),
        (["instruct", *PLACES[:-1], ""], "--out: it is empty, expected a path"),
        (["plan", "instruct", "--size", "tiny", "--steps", "9" * 400], "expected less than 2**63"),
        (["instruct", *PLACES, "--adapter", "qlora"], "'qlora'"),
        (["instruct", *PLACES, "--adapter", "full", "--dropout", "0.5"], "dropout is 0.5"),
        (["instruct", *PLACES], "there is no file or folder d.jsonl"),
        (["plan", "instruct"], "--model --size"),
        (["plan", "instruct", "--size", "tiny", "--gpus", "3"], "gpus is 3"),
        (["plan", "instruct", "--size", "tiny", "--mfu", "40"], "mfu is 40.0"),
    ],
)
def test_a_mistake_is_one_line(arguments, named, capsys):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("idefics2-fast: error: ")
    assert error.count("\n") == 1
    assert named in error


@pytest.mark.parametrize("error", [CheckpointError("saving step 2 failed: no room"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_main_ends_a_run_that_cannot_save_with_74(monkeypatch, capsys, error):
    def stopped(recipe):
        raise error

    monkeypatch.setattr(run, "fit", stopped)
    assert command.main(["instruct", *PLACES]) == 74
    assert capsys.readouterr().err == f"{command.PROGRAM}: error: {error}\n"
    monkeypatch.setenv("RANK", "1")
    assert command.main(["instruct", *PLACES]) == 74
    assert capsys.readouterr().err == ""


def test_the_guards_report_is_exit_code_1(monkeypatch, capsys):
    def stop(recipe):
        raise GuardError("5 steps in a row\nsamples a, b")

    monkeypatch.setattr(run, "fit", stop)
    assert command.main(["instruct", *PLACES]) == 1
    assert capsys.readouterr().err == "5 steps in a row\nsamples a, b\n"


def test_check_names_file_and_line_of_every_bad_row(corpus, tmp_path, capsys, fitted):
    lines = (corpus / "data.jsonl").read_text().splitlines()[:6]
    lines = [json.dumps(json.loads(line) | {"images": [str(corpus / name) for name in json.loads(line)["images"]]}) for line in lines]
    places = ["--model", str(corpus / "model"), "--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out"), "--check"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert command.main(["instruct", *places]) == 0
    assert len(fitted) == 1
    lines[1] = "{"
    lines[4] = json.dumps({"images": ["missing.png"], "texts": [{"user": "a", "assistant": "b"}]})
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    capsys.readouterr()
    assert command.main(["instruct", *places]) == 2
    assert len(fitted) == 1
    errors = capsys.readouterr().err.splitlines()
    assert re.match(rf"{tmp_path}/rows.jsonl, line 2: not valid JSON", errors[0])
    assert re.match(rf"{tmp_path}/rows.jsonl, line 5: image 0: .*missing.png", errors[1])
    assert errors[2:] == ["2 of 6 rows cannot be used"]


def test_check_asks_for_room_in_any_epoch(corpus, tmp_path, capsys, fitted):
    """Half of the samples are split in an epoch, others in the next: a row that fits only whole is named, whatever was drawn for it."""
    lines = [json.loads(line) for line in (corpus / "data.jsonl").read_text().splitlines()]
    talk = [{"user": "?", "assistant": "!"}]
    rows = [{"images": [str(corpus / name) for name in row["images"]], "texts": talk} for row in lines if len(row["images"]) == 2]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    places = ["--model", str(corpus / "model"), "--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out"), "--check"]
    assert command.main(["instruct", *places, "--tokens", "50", "--split-share", "0"]) == 0
    assert command.main(["instruct", *places, "--tokens", "50", "--split-share", "0.01"]) == 2
    assert capsys.readouterr().err.endswith(f"{len(rows)} of {len(rows)} rows cannot be used\n")


def test_the_plan_is_printed(capsys):
    assert command.main(["plan", "instruct", "--size", "idefics2-8b", "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    assert "instruct on 8 GPUs" in out
    assert out.endswith("fits a card of 80 GB\n")
    assert command.main(["plan", "instruct", "--size", "idefics2-8b", "--adapter", "full"]) == 0
    assert "do not fit 80 GB: most are moments" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_is_told_to_end_asks_for_another_go(corpus, tmp_path):
    """As users start it; SIGTERM once a step is recorded. The same command goes on to the end, where the report is."""
    places = ["--model", corpus / "model", "--data", corpus / "data.jsonl", "--out", tmp_path]
    flags = (
        "--steps 40 --warmup 2 --tokens 300 --patches 400 --packs 2 --rank 4 --dtype float32 --checkpointing none --save-every 1000".split()
    )
    start = [sys.executable, "-m", "idefics2_fast.training", "instruct", *map(str, places), *flags]
    process = subprocess.Popen(
        start, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONSAFEPATH": "1"}
    )
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text()):
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == REQUEUE, error
    done = len(metrics.read_text().splitlines())
    assert 1 <= done < 40
    assert not (tmp_path / "report.html").exists()
    again = subprocess.run(start, capture_output=True, text=True, timeout=120, check=True, env=os.environ | {"PYTHONSAFEPATH": "1"})
    assert "40 steps" in again.stdout
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 41))
    assert (tmp_path / "report.html").is_file()
