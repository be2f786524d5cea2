"""The instruct suite: every provider takes the same step on the same samples, and one that does not is seen."""

import json

import pytest
import torch
from PIL import Image

from idefics2_fast.benchmarks import __main__ as command
from idefics2_fast.benchmarks import instruct
from idefics2_fast.benchmarks.case import Case, Figure, Figures, Row
from idefics2_fast.benchmarks.instruct import near_first, stored
from idefics2_fast.benchmarks.record import read_records
from idefics2_fast.benchmarks.timing import PeakMemory, Watch
from idefics2_fast.training.parallel import ranks
from idefics2_fast.training.samples import read_row

CPU = torch.device("cpu")


@pytest.fixture
def small_pictures(monkeypatch):
    """In place of the committed sizes: as small as the processor leaves images, one document with two, one without any."""
    monkeypatch.setitem(instruct.SIZES, "tiny", (((378, 392),), ((406, 378), (378, 378)), ()))


@pytest.mark.slow
def test_all_steps_have_the_same_loss_and_gradient(small_pictures):
    with ranks() as group:
        case = instruct.step_case("tiny", group, instruct.SIZES["tiny"])
        given = {name: call(Watch(CPU)) for name, call in case.calls.items()}
        assert list(given) == ["hf", "hf-tuned", "idefics2_fast"]
        assert {name: case.check(name, outcome) for name, outcome in given.items()} == dict.fromkeys(given, "")
        (loss, norm) = case.calls["hf"](Watch(CPU))  # other noise, in its own place
        assert loss == pytest.approx(given["hf"][0], rel=0.1)
        assert case.check("other noise", (loss, norm)) != ""


def test_fresh_adapters_of_both_kinds_give_one_loss(small_pictures):
    with ranks() as group:
        case = instruct.adapters_case("tiny", group, instruct.SIZES["tiny"])
        given = {name: call(Watch(CPU)) for name, call in case.calls.items()}
    assert list(given) == ["LoRA", "idefics2_fast"]
    assert {name: case.check(name, outcome) for name, outcome in given.items()} == dict.fromkeys(given, "")
    assert given["LoRA"][1] != given["idefics2_fast"][1]


def test_another_loss_or_gradient_is_seen():
    check = near_first()
    assert check("hf", (10.0, 2.0)) == ""
    assert check("near", (10.0005, 2.0001)) == ""
    assert "the loss is 10.002" in check("off", (10.002, 2.0))
    assert "norm of the gradient" in check("off", (10.0, 2.001))
    assert "the loss is nan" in check("off", (float("nan"), 2.0))


def test_stored_rows_are_the_same_samples(tmp_path):
    (row, *_) = rows = instruct.documents(instruct.SIZES["small"])
    lines = [json.loads(json.dumps(line)) for line in stored(rows, tmp_path)]
    sample = read_row(lines[0], "0", tmp_path)
    assert sample.turns == read_row(row, "0").turns
    with Image.open(sample.images[0]) as image:
        assert image.size[::-1] == instruct.SIZES["small"][0][0]
    assert isinstance(row["messages"][0]["content"][0]["image"], Image.Image)


def test_the_command_runs_the_suite(monkeypatch, tmp_path):
    def cases_of(size, pictures):
        call = lambda watch: watch.start("x")  # noqa: E731
        yield Case("instruct", {"hf": call, "idefics2_fast": call}, lambda name, output: "", (Row(f"{size} step", ("x",)),))

    monkeypatch.setattr(PeakMemory, "available", lambda device: False)
    monkeypatch.setattr(instruct, "cases_of", cases_of)
    monkeypatch.setattr(instruct, "loader_figures", lambda: Figures("instruct", instruct.LOADING, [Figure("fill", 0.95, "", 0.9)]))
    assert command.main(["instruct", "--out", str(tmp_path / "out.jsonl")]) == 0
    assert {record.case for record in read_records(tmp_path / "out.jsonl")} == {"tiny step", "small step", instruct.LOADING}
