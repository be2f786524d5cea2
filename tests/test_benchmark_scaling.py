"""The scaling suite: exponents are slopes, every size is a phase, and a wrong output at one of them is seen."""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from idefics2_fast.benchmarks import scaling
from idefics2_fast.benchmarks.case import CPU, Case, LeftOut, Row
from idefics2_fast.benchmarks.dora_linear import layer_case
from idefics2_fast.benchmarks.report import records
from idefics2_fast.benchmarks.scaling import EXPECTED, FITTED, exponent, joined
from idefics2_fast.benchmarks.timing import Measurement, Watch


@pytest.mark.parametrize("power", [0.0, 1.0, 1.7])
def test_an_exponent_is_the_slope_of_logarithms(power: float) -> None:
    assert exponent([3, 10, 70], [5e-3 * size**power for size in (3, 10, 70)]) == pytest.approx(power)


def doubled(wrong_at: int | None = None) -> Case:
    """Work of several sizes, whose seconds are said by hand."""

    def case(size: int) -> Case:
        def call(watch: Watch) -> int:
            watch.seconds["a"] += 1e-3 * size
            watch.seconds["b"] += 1e-3 * size
            return size + (size == wrong_at)

        return Case("x", {"idefics2_fast": call, "other": call}, lambda name, out: "" if out == size else f"{out}", (Row("", ("a", "b")),))

    return joined("widgets", {size: case(size) for size in (1, 2, 4)}, ("idefics2_fast", "other"), lambda size: size**1.5)


def test_every_size_is_a_phase_of_one_call() -> None:
    case, watch = doubled(), Watch(CPU)
    outputs = case.calls["idefics2_fast"](watch)
    assert watch.seconds == pytest.approx({"1": 2e-3, "2": 4e-3, "4": 8e-3})
    assert [(row.name, row.phases) for row in case.rows] == [(f"widgets: {size}", (str(size),)) for size in (1, 2, 4)]
    assert case.check("idefics2_fast", outputs) == ""


def test_a_wrong_output_at_one_size_is_seen() -> None:
    case = doubled(wrong_at=4)
    assert case.check("idefics2_fast", case.calls["idefics2_fast"](Watch(CPU))) == "5"


def test_the_fitted_exponent_stands_beside_the_expected() -> None:
    case = doubled()
    rounds = [{str(size): factor * size**2.0 for size in (1, 2, 4)} for factor in (1.0, 3.0)]
    results = {name: Measurement(rounds=rounds) for name in case.calls}
    made = {(r.provider, r.metric): r for r in records(case, results, CPU) if r.case == "widgets"}
    assert made["idefics2_fast", EXPECTED].value == pytest.approx(1.5)
    assert made["idefics2_fast", FITTED].value == pytest.approx(2.0)
    assert made["other", FITTED].low == pytest.approx(2.0)
    held = {(f.provider, f.name): f.holds for f in case.derived(results).figures}
    assert not held["idefics2_fast", FITTED]
    assert held["other", FITTED]


class Flops(TorchDispatchMode):
    """Counts what is computed; torch's own counter follows modules, which fails when leaves are asked for their gradients."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def test_a_layers_flops_are_those_of_its_products() -> None:
    case = layer_case((scaling.LAYER, scaling.LAYER), 0.0, CPU, rank=128)
    with Flops() as counted:
        case.calls["idefics2_fast"](Watch(CPU))
    assert scaling.layer_flops(128) == pytest.approx(counted.total, rel=0.1)


def test_prompts_have_about_the_tokens_that_they_are_said_to_have() -> None:
    setting = scaling.load_setting("tiny", torch.float32, CPU)
    for tokens in (64, 200):
        asked = []
        setting.tuned.first_logits = lambda inputs, asked=asked: asked.append(inputs["input_ids"].shape[1])
        scaling.prompt_case(setting, tokens).calls["hf-tuned"](Watch(CPU))
        assert asked[0] == pytest.approx(tokens, abs=4)


def test_ranks_without_a_core_each_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(scaling, "step_seconds", lambda ranks: 2.0 * ranks)
    made = list(scaling.worlds())
    assert [what.case for what in made] == ["ranks: 1", "ranks: 2", "ranks: 4", "ranks: 8", "ranks"]
    assert [isinstance(what, LeftOut) for what in made] == [False, False, True, True, False]
    (expected, fitted) = made[-1].figures
    assert (expected.value, fitted.value, fitted.holds) == (0.0, pytest.approx(1.0), False)


@pytest.mark.slow
def test_a_run_over_ranks_has_steps() -> None:
    assert scaling.step_seconds(1, steps=6) > 0
