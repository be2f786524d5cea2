"""The sm90 suite: figures on paper for every line of docs/performance.md, and work for a card that computes what the line says."""

from dataclasses import replace

import pytest
import torch

from idefics2_fast.benchmarks.case import CPU, Figures, LeftOut, Scope
from idefics2_fast.benchmarks.sm90 import roofline, suite
from idefics2_fast.benchmarks.sm90.suite import WORKS, of_line, timed
from idefics2_fast.benchmarks.timing import Watch

# of each of a line's numbers; what a line does not name has its usual size
SMALL = {"rows": 24, "width": 32, "outs": 48, "rank": 8, "images": 8, "patches": 24, "tokens": 64, "vocabulary": 50, "classes": 50}
LINES = {line.title: line for line in roofline.LINES}
TIMED = {title: line for title, line in LINES.items() if line.op is not roofline.softmax}


def smaller(line):
    return replace(line, shape={name: SMALL.get(name, value) for name, value in line.shape.items()})


def test_titles_are_names():
    assert len(LINES) == len(roofline.LINES)


def test_every_line_has_a_floor_and_a_prediction_and_no_time_without_a_card(monkeypatch):
    monkeypatch.setattr(roofline, "rates", lambda lines: {kernel: 4e14 for line in lines for kernel in line.kernels})
    made = list(suite.cases(Scope(quick=True)))
    assert isinstance(made[0], Figures)
    assert made[0].device == suite.PAPER
    assert [figure.name for figure in made[0].figures] == ["floor", "predicted, unmeasured", "goal"]
    assert isinstance(made[-1], LeftOut)


def test_figures_are_those_of_the_page():
    line = LINES["K/V of 3 layers, 4900 patches"]
    floor, prediction, goal = of_line(line, dict.fromkeys(line.kernels, 400000000000000.0))
    assert (floor.value, floor.note) == (line.work.floor, "compute")
    assert prediction.value == pytest.approx(line.work.flops / 4e14)
    assert goal.value == pytest.approx(135e-6)


@pytest.mark.parametrize("title", TIMED)
def test_the_work_of_a_line_runs_and_is_held_against_its_reference(title, monkeypatch):
    monkeypatch.setattr(suite, "TURNS", 2)
    case = timed(smaller(TIMED[title]), CPU)
    watch = Watch(CPU)
    output = case.calls["idefics2_fast"](watch)
    assert set(watch.seconds) == set(case.rows[0].phases) == {"backward" if "backward" in title else "forward"}
    assert case.rows[0].steps == 2
    if "NEFTune" not in title:  # the noise is the same here and in the reference, which is fp32
        assert case.check("idefics2_fast", output) == ""
    assert "off by" in case.check("idefics2_fast", [1.1 * value for value in output])


@pytest.mark.parametrize("title", TIMED)
def test_a_line_is_timed_at_its_own_shapes(title):
    """The numbers that the formula counts are those of the operands and of what comes out."""
    line = smaller(TIMED[title])
    shape = {name: value for name, value in line.shape.items() if name not in ("backward", "noise")}
    work = WORKS[line.op.__name__](CPU, **shape)
    y = work.op(*work.inputs)
    assert torch.isfinite(y).all()
    if "patches" in shape:
        shape["keys"] = shape.pop("images") * shape.pop("patches")
    assert set(shape.values()) <= {size for tensor in (y, *work.inputs) for size in tensor.shape}
