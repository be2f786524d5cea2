"""The sm90 suite: figures on paper for every line of docs/performance.md, and work for a card that computes what the line says."""

import pytest
import torch

from idefics2_fast.benchmarks.case import CPU, Figures, LeftOut, Scope
from idefics2_fast.benchmarks.sm90 import roofline, suite
from idefics2_fast.benchmarks.sm90.suite import Shapes, of_line, timed, work
from idefics2_fast.benchmarks.timing import Watch

SMALL = Shapes(patches=24, hidden=32, outs=48, heads=4, kv_heads=2, head_dim=8, latents=8, tokens=64, vocabulary=50)
TITLES = [line.title for line in roofline.LINES]


def test_every_line_has_a_floor_and_a_prediction_and_no_time_without_a_card(monkeypatch):
    monkeypatch.setattr(roofline, "rates", lambda lines: {kernel: 4e14 for line in lines for kernel in line.kernels})
    made = list(suite.cases(Scope(quick=True)))
    assert isinstance(made[0], Figures)
    assert made[0].device == suite.PAPER
    assert [figure.name for figure in made[0].figures] == ["floor", "predicted, unmeasured", "goal"]
    assert isinstance(made[-1], LeftOut)


def test_figures_are_those_of_the_page():
    line = roofline.LINES[0]
    floor, prediction, goal = of_line(line, dict.fromkeys(line.kernels, 400000000000000.0))
    assert (floor.value, floor.note) == (line.work.floor, "compute")
    assert prediction.value == pytest.approx(line.work.flops / 4e14)
    assert goal.value == pytest.approx(135e-6)


@pytest.mark.parametrize("title", TITLES)
def test_the_work_of_a_line_runs_and_is_held_against_its_reference(title, monkeypatch):
    monkeypatch.setattr(suite, "TURNS", 2)
    case = timed(title, CPU, SMALL)
    watch = Watch(CPU)
    output = case.calls["idefics2_fast"](watch)
    assert set(watch.seconds) == set(case.rows[0].phases) == {"backward" if "backward" in title else "forward"}
    assert case.rows[0].steps == 2
    if "NEFTune" not in title:  # the noise is the same here and in the reference, which is fp32
        assert case.check("idefics2_fast", output) == ""
    assert "off by" in case.check("idefics2_fast", [1.1 * value for value in output])


@pytest.mark.parametrize(
    ("title", "expected"), [(TITLES[0], "perceiver_context"), (TITLES[3], "perceiver_attention"), (TITLES[5], "embedding")]
)
def test_a_line_is_its_op_at_its_shapes(title, expected):
    name, op, inputs, backward = work(title, CPU, SMALL)
    assert (name, backward) == (expected, False)
    rows = {"perceiver_context": SMALL.patches, "perceiver_attention": 8 * SMALL.latents, "embedding": SMALL.tokens}[expected]
    assert op(*inputs).shape[0] == rows
    assert torch.isfinite(op(*inputs)).all()
