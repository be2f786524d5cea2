"""The patch suite: a Hugging Face model under `idefics2_fast.patch` beside the same model as it comes and tuned. Everything in fp32.

A provider's outputs and gradients must be within 2e-5 of the largest value, and its greedy tokens the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from idefics2_fast.benchmarks import model
from idefics2_fast.benchmarks.case import Case, Row, Scope
from idefics2_fast.benchmarks.model import PROMPT, Setting, mixed_images
from idefics2_fast.benchmarks.providers import HuggingFace, HuggingFaceTuned, Patched, Provider, answer, checkpoint, question
from idefics2_fast.benchmarks.timing import Call, Watch
from idefics2_fast.benchmarks.training_step import (
    UNCACHED,
    Gradients,
    PatchedStep,
    Step,
    TunedStep,
    documents,
    halved,
    one_step_alone,
)

SUITE = "patch"
NEW_TOKENS = 32
DOCUMENTS = 4  # as many as transformers and PEFT, as they come, train on in 11 GB: `small` at eight takes 22 GB
ANSWERING = ("image encoding", "prefill", "decode")
TOLERANCE = 2e-5

OFF = dict.fromkeys(
    ("attention", "perceiver", "fused_linear_cross_entropy", "dora", "neftune", "image_processor", "rms_norm", "swiglu", "rope"), False
)
ALONE = {
    "packing alone": OFF | {"attention": True, "perceiver": True},
    "DoRA alone": OFF | {"dora": True},
    "loss alone": OFF | {"fused_linear_cross_entropy": True},
}


KINDS = ("encode", "generate", "train", "parts")


def cases(scope: Scope) -> Iterator[Case]:
    """The suite's cases for the size that is asked for, else `tiny`: `small` takes minutes a case. Of a quick run the first."""
    kinds, images = (KINDS[:1], 2) if scope.quick else (KINDS, 8)
    yield from cases_of(scope.model or "tiny", scope.device, kinds, images)


def cases_of(size: str, device: torch.device, kinds: Sequence[str], images: int) -> Iterator[Case]:
    if {"encode", "generate"} & set(kinds):
        setting = load_setting(size, device)
        if "encode" in kinds:
            yield encode_case(setting, images)
        if "generate" in kinds:
            yield generate_case(setting)
        del setting
    if "train" in kinds:
        yield training_case(size, device)
    if "parts" in kinds:
        yield ablation_case(size, device)


def load_setting(size: str, device: torch.device) -> Setting:
    with checkpoint(size, torch.float32) as folder:
        hf = HuggingFace(folder, torch.float32, device)
        patched = Patched(folder, torch.float32, device)
    tuned = HuggingFaceTuned(hf)
    return Setting(f"{size} fp32", hf, tuned, patched, reference=tuned)


def encode_case(setting: Setting, images: int = 8) -> Case:
    """`get_image_features` of mixed images."""
    case = model.encode_case(setting, 0.40, images)
    (row,) = case.rows
    return replace(case, suite=SUITE, absent={}, rows=(replace(row, name=f"{row.name}: encode", needs={"hf": 6.0, "hf-tuned": 1.0}),))


def generate_case(setting: Setting) -> Case:
    """Four prompts with one image each, answered greedily."""
    chats = [question(PROMPT[: 60 + 20 * n], [image]) for n, image in enumerate(mixed_images(0.40)[:4])]

    def call(provider: Provider) -> Call:
        def run(watch: Watch) -> list[list[int]]:
            watch.start("image processing")
            return answer(provider, provider.process(chats), NEW_TOKENS, watch)

        return run

    name = f"{setting.name}, 4 prompts, {NEW_TOKENS} tokens each: generate"
    needs = {"hf": 2.5, "hf-tuned": 1.0}
    rows = (
        Row(f"{name}, preprocessed images", ANSWERING, needs=needs),
        Row(f"{name}, image processing included", ("image processing", *ANSWERING), needs=needs),
    )
    return Case(SUITE, {provider.name: call(provider) for provider in setting.providers}, same_tokens(), rows)


def training_case(size: str, device: torch.device) -> Case:
    """A DoRA step on four documents with one mixed image each."""
    with checkpoint(size, torch.float32) as folder:
        load = partial(HuggingFace, folder, torch.float32, device)
        steps = TunedStep(load()), TunedStep(load(), cached=False), PatchedStep(load())
    calls = {Step.name: one_step_alone(size, DOCUMENTS)} | {step.name: step.call(step.process(documents(DOCUMENTS))) for step in steps}
    needs, memory = {"hf": 4.0, "hf-tuned": 1.3}, {"hf": 0.4, "hf-tuned": 0.7, UNCACHED: 0.7}
    row = Row(f"{size} fp32, {DOCUMENTS} images: DoRA training step", ("step",), needs=needs, memory=memory, pass_="both")
    return Case(SUITE, calls, near_first(), (row,))


def ablation_case(size: str, device: torch.device) -> Case:
    """What each of the patch's parts is worth in a DoRA step, by itself. Images have half their width and height, for time's sake."""
    with checkpoint(size, torch.float32) as folder:
        load = partial(HuggingFace, folder, torch.float32, device)
        steps = [Step(load()), *(PatchedStep(load(), name, **switches) for name, switches in ALONE.items()), PatchedStep(load())]
    calls = {step.name: step.call(halved(step.process(documents(DOCUMENTS)))) for step in steps}
    row = Row(f"{size} fp32, {DOCUMENTS} images of half the size: parts of a DoRA training step", ("step",), pass_="both")
    return Case(SUITE, calls, near_first(), (row,))


def same_tokens() -> Callable[[str, Any], str]:
    """A check of token ids against the first provider's."""
    expected: list[list[list[int]]] = []

    def check(name: str, tokens: list[list[int]]) -> str:
        expected.append(tokens)
        return "" if tokens == expected[0] else "other token ids than transformers"

    return check


def near_first() -> Callable[[str, Any], str]:
    """A check of gradients against those of the first provider that has any, transformers and PEFT as they come."""
    expected: Gradients = {}

    def check(name: str, gradients: Gradients | str) -> str:
        if isinstance(gradients, str):
            return gradients
        if not expected:
            expected.update(gradients)
        if gradients.keys() != expected.keys():
            return f"gradients of {len(gradients)} parameters, expected {len(expected)}"
        worst, parameter = max((error(gradients[name], expected[name]), name) for name in expected)
        return "" if worst <= TOLERANCE else f"the gradient of {parameter} is off by {worst:.1e} of its largest value"

    return check


def error(actual: Tensor | None, expected: Tensor) -> float:
    """The greatest, over the largest value expected; infinite where there is nothing to compare or it is not a number."""
    if actual is None:
        return math.inf
    worst = ((actual - expected).abs().max() / expected.abs().max()).item()
    return math.inf if math.isnan(worst) else worst
