"""The patch suite: every provider does the same work, and one that does not is seen."""

import inspect
import math
import re

import pytest
import torch
from PIL import Image
from torch import nn

import idefics2_fast
from idefics2_fast.benchmarks import __main__ as command
from idefics2_fast.benchmarks import model, patch, training_step
from idefics2_fast.benchmarks.case import Case, Row, Scope
from idefics2_fast.benchmarks.patch import ALONE, OFF, error, near_first, same_tokens
from idefics2_fast.benchmarks.providers import HuggingFace, checkpoint
from idefics2_fast.benchmarks.record import read_records
from idefics2_fast.benchmarks.report import records, verdicts
from idefics2_fast.benchmarks.timing import Measurement, PeakMemory, Watch
from idefics2_fast.benchmarks.training_step import ANSWER_TOKENS, UNCACHED, PatchedStep, Step, TunedStep, documents, one_step_alone
from idefics2_fast.patching.ledger import patched_names

CPU = torch.device("cpu")
EVERYONE = ["hf", "hf-tuned", "idefics2_fast"]


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """In place of the committed sizes: other pictures, as small as the processor leaves them, of different sizes."""
    pictures = [Image.linear_gradient("L").resize((378 + 28 * n, 392)).rotate(90 * n).convert("RGB") for n in range(8)]
    for module in (model, patch, training_step):
        monkeypatch.setattr(module, "mixed_images", lambda share: pictures)


@pytest.fixture
def load():
    with checkpoint("tiny", torch.float32) as folder:
        yield lambda: HuggingFace(folder, torch.float32, CPU)


@torch.inference_mode()
def outputs(case: Case) -> dict:
    return {name: call(Watch(CPU)) for name, call in case.calls.items()}


# --- encoding and answering ---


@pytest.fixture(scope="module")
def setting():
    return patch.load_setting("tiny", CPU)


@pytest.mark.slow
@pytest.mark.parametrize("made", [patch.encode_case, patch.generate_case])
def test_every_provider_is_right_and_the_patch_must_be_fast(setting, made, monkeypatch):
    monkeypatch.setattr(patch, "NEW_TOKENS", 3)
    case = made(setting)
    given = outputs(case)
    assert list(given) == EVERYONE
    assert {name: case.check(name, output) for name, output in given.items()} == dict.fromkeys(EVERYONE, "")
    least = 6.0 if made is patch.encode_case else 2.5
    assert all(row.needs == {"hf": least, "hf-tuned": 1.0} for row in case.rows)
    assert case.suite == "patch"


def patched(module):
    return {name for part in module.modules() for name in patched_names(part)}


def test_one_provider_is_patched(setting):
    assert not patched(setting.hf.model)
    assert "get_image_features" in patched(setting.engine.model)


def test_other_tokens_are_seen():
    check = same_tokens()
    assert check("hf", [[1, 2]]) == ""
    assert check("hf-tuned", [[1, 2]]) == ""
    assert "other token ids" in check("idefics2_fast", [[1, 3]])


# --- training ---


def gradients_of(step, inputs=None):
    return step.call(step.process(documents(2)) if inputs is None else inputs)(Watch(CPU))


@pytest.mark.slow
def test_all_steps_have_the_same_gradients(load):
    check = near_first()
    steps = [Step(load()), TunedStep(load()), TunedStep(load(), cached=False), PatchedStep(load())]
    assert [step.name for step in steps] == ["hf", "hf-tuned", UNCACHED, "idefics2_fast"]
    assert {step.name: check(step.name, gradients_of(step)) for step in steps} == {step.name: "" for step in steps}


@pytest.mark.slow
def test_a_wrong_gradient_is_seen(load):
    step = Step(load())
    right = {name: value.clone() for name, value in gradients_of(step).items()}
    check = near_first()
    assert check("hf", right) == ""
    name = next(name for name in right if "lora_magnitude" in name)
    for factor in (1 + 1e-4, float("nan")):
        assert f"the gradient of {name}" in check("off", right | {name: right[name] * factor})
    assert "off by inf" in check("missing", right | {name: None})
    assert "gradients of" in check("fewer", {name: right[name]})
    assert check("no gradients", "its process ended with -9: []") == "its process ended with -9: []"


@pytest.mark.slow
def test_swapped_images_and_shifted_labels_change_the_gradients(load):
    step, check = Step(load()), near_first()
    inputs = step.process(documents(2))
    check("hf", {name: value.clone() for name, value in gradients_of(step, inputs).items()})
    swapped = {name: inputs[name].flip(0) for name in ("pixel_values", "pixel_attention_mask")}
    assert "off by" in check("swapped", gradients_of(step, {**inputs, **swapped}))
    assert "off by" in check("shifted", gradients_of(step, {**inputs, "labels": inputs["labels"].roll(1, 1)}))


@pytest.mark.slow
def test_a_step_is_taken_and_the_next_begins_where_it_began(load):
    step = Step(load())
    first = {name: value.clone() for name, value in gradients_of(step).items()}
    moved = [name for name, parameter in step.trained.items() if not torch.equal(parameter, step.start[name])]
    assert moved == list(step.trained)
    assert all(torch.equal(value, first[name]) for name, value in gradients_of(step).items())


@pytest.mark.slow
@pytest.mark.parametrize("made", [TunedStep, PatchedStep])
def test_norms_are_those_of_each_steps_weights(load, made):
    step, plain, check = made(load()), Step(load()), near_first()
    gradients_of(step)
    for name, parameter in plain.start.items():
        if "lora_B" in name:
            step.start[name], plain.start[name] = 3 * parameter, 3 * parameter
    check("hf", gradients_of(plain))
    assert check(step.name, gradients_of(step)) == ""


@pytest.mark.slow
def test_patched_steps_are_patched(load):
    assert "get_image_features" in patched(PatchedStep(load()).model)
    alone = PatchedStep(load(), "loss alone", **ALONE["loss alone"])
    assert patched(alone.model)
    assert "get_image_features" not in patched(alone.model)


def test_every_linear_layer_but_the_head_is_adapted_and_trained(load):
    plain = load()
    linear = {name for name, module in plain.model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    step = Step(plain)
    adapted = {re.sub(r"^base_model\.model\.|\.lora_.*$", "", name) for name in step.trained}
    assert adapted == linear
    assert len(step.trained) == 3 * len(linear)
    assert all(parameter.count_nonzero() == parameter.numel() for parameter in step.trained.values())


def test_a_tenth_of_each_document_is_an_answer_of_text(load):
    inputs = Step(load()).process(documents(4))
    trained = inputs["labels"] != -100
    assert trained.sum(1).tolist() == [ANSWER_TOKENS] * 4
    assert inputs["attention_mask"][trained].all()
    assert not (inputs["input_ids"][trained] >= 32000).sum() > 4  # the turn's end alone
    lengths = inputs["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    assert 0.08 < ANSWER_TOKENS / lengths.float().mean() < 0.12


def test_parts_of_the_patch_are_switched_on_alone():
    switches = {name for name, parameter in inspect.signature(idefics2_fast.patch).parameters.items() if parameter.default is True}
    assert set(OFF) == switches
    on = [{name for name, value in part.items() if value} for part in ALONE.values()]
    assert on == [{"attention", "perceiver"}, {"dora"}, {"fused_linear_cross_entropy"}]


@pytest.mark.slow
def test_parts_of_the_patch_have_the_same_gradients():
    case = patch.ablation_case("tiny", CPU)
    given = outputs(case)
    assert list(given) == ["hf", *ALONE, "idefics2_fast"]
    assert {name: case.check(name, output) for name, output in given.items()} == dict.fromkeys(given, "")


@pytest.mark.slow
def test_a_step_alone_is_the_same_step_and_taken_once(load, monkeypatch):
    call = one_step_alone("tiny", 1)
    first, second = Watch(CPU), Watch(CPU)
    gradients = call(first)
    assert call(second) is gradients
    assert second.seconds == first.seconds
    assert first.seconds["step"] > 0
    if PeakMemory.available(CPU):
        assert 1e7 < first.peaks["step"] < 5e9
    monkeypatch.undo()  # the process took a committed image
    check = near_first()
    check("hf", gradients_of(Step(load()), Step(load()).process(documents(1))))
    assert check("alone", gradients) == ""


def test_a_step_that_fails_says_how(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'no memory for you' >&2\nexit 137\n")
    python.chmod(0o755)
    monkeypatch.setattr(training_step.sys, "executable", str(python))
    said = one_step_alone("tiny", 1)(Watch(CPU))
    assert "its process ended with 137" in said
    assert "no memory for you" in said


# --- the harness ---


def test_memory_is_required_and_the_pass_is_recorded():
    row = Row("a step", ("step",), memory={"hf": 0.4, "hf-tuned": 0.7}, pass_="both")
    results = {name: Measurement(rounds=[{"step": 1.0}], peaks={"step": peak}) for name, peak in zip(EVERYONE, (100, 50, 40), strict=True)}
    assert verdicts(row, results) == {"memory <= 0.4x hf": True, "memory <= 0.7x hf-tuned": False}
    assert not any(verdicts(row, results | {"idefics2_fast": Measurement(wrong="off")}).values())
    assert not verdicts(row, results | {"hf": Measurement(wrong="out of memory")})["memory <= 0.4x hf"]
    assert {record.pass_ for record in records(Case("patch", {}, None, (row,)), results, CPU)} == {"both"}


def test_errors_are_relative_to_the_largest_value():
    assert error(torch.tensor([1.0, 100.0]), torch.tensor([2.0, 100.0])) == pytest.approx(0.01)
    assert error(torch.tensor([math.nan, 100.0]), torch.tensor([2.0, 100.0])) == math.inf


def test_the_command_runs_the_suite(monkeypatch, tmp_path):
    def cases_of(size, device, kinds, images):
        for name in kinds:
            call = lambda watch: watch.start("x")  # noqa: E731
            yield Case("patch", {"hf": call, "idefics2_fast": call}, lambda name, output: "", (Row(f"{size} {name}", ("x",)),))

    monkeypatch.setattr(PeakMemory, "available", lambda device: False)
    monkeypatch.setattr(patch, "cases_of", cases_of)
    assert command.main(["patch", "--out", str(tmp_path / "out.jsonl")]) == 0
    measured = {record.case for record in read_records(tmp_path / "out.jsonl")}
    assert measured == {f"tiny {kind}" for kind in patch.KINDS}


def test_a_whole_run_takes_the_model_that_it_has_time_for(monkeypatch):
    monkeypatch.setattr(patch, "cases_of", lambda size, device, kinds, images: (f"{size} {kind}" for kind in kinds))
    assert list(patch.cases(Scope())) == ["tiny encode", "tiny generate", "tiny train", "tiny parts"]
    assert list(patch.cases(Scope(model="small"))) == ["small encode", "small generate", "small train", "small parts"]
    assert list(patch.cases(Scope(quick=True))) == ["tiny encode"]
