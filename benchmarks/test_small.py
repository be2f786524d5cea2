"""`pytest benchmarks`: the quick cases of images and kernels by pytest-benchmark, every provider checked before it is timed.

Its clock sees whole calls; `python -m idefics2_fast.benchmarks` times their phases, and all providers in turns.
"""

from __future__ import annotations

import importlib
from functools import cache

import pytest
import torch

from idefics2_fast.benchmarks.__main__ import KERNELS
from idefics2_fast.benchmarks.case import Case, Scope, threads
from idefics2_fast.benchmarks.timing import Watch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROVIDERS = {
    "images": ("idefics2_fast", "hf", "hf torchvision"),
    "dora_linear": ("idefics2_fast", "peft", "frozen"),
    "embedding": ("idefics2_fast", "hf"),
    "linear_cross_entropy": ("idefics2_fast", "hf", "torch", "liger"),
    "perceiver": ("idefics2_fast", "hf"),
    "segment_attention": ("idefics2_fast", "hf", "flash-attn", "xformers", "torch varlen_attn"),
}
assert {"images", *KERNELS} == set(PROVIDERS)


@cache
def case(suite: str) -> Case:
    return next(importlib.import_module(f"idefics2_fast.benchmarks.{suite}").cases(Scope(DEVICE, quick=True)))


@pytest.mark.parametrize(("suite", "provider"), [(suite, provider) for suite, names in PROVIDERS.items() for provider in names])
def test_quick_case(benchmark: object, suite: str, provider: str) -> None:
    made = case(suite)
    if provider in made.absent:
        pytest.skip(made.absent[provider])
    benchmark.group = f"{suite}: {made.rows[-1].name}"
    with threads(made.threads), torch.inference_mode():
        watch = Watch(made.device or DEVICE)
        assert made.check(provider, made.calls[provider](watch)) == ""
        benchmark.pedantic(lambda: made.calls[provider](watch), rounds=3)
