"""The suites of kernels: every provider is right in its case, one that is wrong is seen, and one that is missing is named."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from idefics2_fast.benchmarks import dora_linear, embedding, linear_cross_entropy, perceiver, segment_attention
from idefics2_fast.benchmarks.case import CPU, Case, Scope
from idefics2_fast.benchmarks.report import records
from idefics2_fast.benchmarks.timing import Measurement, Watch


@pytest.fixture(params=["dora_linear", "embedding", "linear_cross_entropy", "perceiver", "segment_attention"])
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A suite's case, as small as it can be."""
    match request.param:
        case "dora_linear":
            monkeypatch.setattr(dora_linear, "TOKENS", 16)
            return dora_linear.layer_case((64, 48), 0.1, CPU, rank=4)
        case "embedding":
            for name, value in {"VOCABULARY": 32003, "WIDTH": 8, "TOKENS": {"cpu": 256}}.items():
                monkeypatch.setattr(embedding, name, value)
            return embedding.embedding_case(True, True, CPU, embedding.QUICK)
        case "linear_cross_entropy":
            for name, value in {"VOCABULARY": 40, "WIDTH": 16, "TOKENS": 64}.items():
                monkeypatch.setattr(linear_cross_entropy, name, value)
            return linear_cross_entropy.loss_case("trained", CPU, 0.5)
        case "perceiver":
            return perceiver.pool_case(64, 32, CPU)
        case "segment_attention":
            return segment_attention.attention_case([(42, 56), (28, 98)], CPU)


def taken(case: Case) -> dict[str, list[torch.Tensor]]:
    return {name: list(call(Watch(CPU))) for name, call in case.calls.items()}


def test_every_provider_is_right_and_a_wrong_one_is_seen(case: Case) -> None:
    outputs = taken(case)
    assert {name: case.check(name, output) for name, output in outputs.items()} == dict.fromkeys(outputs, "")
    right = outputs["idefics2_fast"]
    for place, value in enumerate(right):
        if case.suite == "embedding" and place == 0:
            continue  # noise may be anything within its bounds
        wrong = [*right[:place], value * 1.001, *right[place + 1 :]]
        assert "off" in case.check("idefics2_fast", wrong), place


def test_what_is_no_number_is_wrong(case: Case) -> None:
    """In any of the tensors, behind others that are right."""
    right = taken(case)["idefics2_fast"]
    for place, value in enumerate(right):
        wrong = [*right[:place], value.clone().flatten().index_fill(0, torch.tensor([0]), torch.nan).view(value.shape), *right[place + 1 :]]
        assert case.check("idefics2_fast", wrong) != "", place


def test_passes_are_told_apart(case: Case) -> None:
    assert {row.pass_ for row in case.rows} <= {"forward", "backward", "both"}
    assert len({(row.name, row.pass_) for row in case.rows}) == len(case.rows)
    for row in case.rows:
        assert (len(row.phases) == 2 or row.phases == ("loss",)) == (row.pass_ == "both")


def test_a_dora_layer_is_judged_by_what_it_costs_beyond_the_frozen_one() -> None:
    seconds = {"frozen": 1.0, "peft": 3.0, "idefics2_fast": 1.5, "idefics2_fast, norms kept": 1.25}
    results = {
        name: Measurement(rounds=[{"forward": 0.25 * time, "backward": 0.75 * time}] * 3, peaks={"forward": 1, "backward": int(100 * time)})
        for name, time in seconds.items()
    }
    figures = {(f.provider, f.name): f for f in dora_linear.overheads("a layer", results, judged=True).figures}
    time, memory = (figures["idefics2_fast", f"{what} overhead against peft"] for what in ("time", "memory"))
    assert (time.value, memory.value, time.holds, memory.holds) == (pytest.approx(0.25), pytest.approx(0.25), True, True)
    assert figures["idefics2_fast, norms kept", "time overhead against peft"].value == pytest.approx(0.125)


def test_what_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    assert "liger-kernel is not installed" in linear_cross_entropy.absent(CPU)["liger"]
    assert "has no linear_cross_entropy" in linear_cross_entropy.absent(CPU)["torch"]
    missing = segment_attention.absent(torch.device("cuda"))
    assert set(missing) == {"torch varlen_attn", "flash-attn", "xformers"}
    assert missing["flash-attn"] == "flash-attn is not installed"


def test_absent_providers_are_records(monkeypatch: pytest.MonkeyPatch) -> None:
    case = segment_attention.attention_case([(28, 28)], CPU)
    results = {name: Measurement(absent=reason) for name, reason in case.absent.items()}
    made = {(r.provider, r.value, r.note) for r in records(case, results, CPU)}
    assert ("torch varlen_attn", None, "absent: it needs a CUDA device") in made
    assert len(made) == 3


def test_quick_cases_are_small() -> None:
    for suite in (dora_linear, perceiver, segment_attention):
        (case,) = suite.cases(Scope(quick=True))
        assert all(row.needs == {} for row in case.rows) or suite is segment_attention
