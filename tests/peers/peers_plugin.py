"""What other people's suites run under: a pytest plugin, loaded by test_peers.py into a process of its own.

The environment says the rest. PEERS_FOLDER: where the fetched suites lie. PEERS_PATCHED: "1" runs everything under the patch.
PEERS_OUTCOMES: the file that takes every test's outcome.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

# From the best to the worst; a test's outcome is the worst of its parts.
OUTCOMES = ("passed", "skipped", "failed")
# What huggingface_hub and its callers raise where there is no network.
OFFLINE = ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "couldn't connect to 'https://huggingface.co'", "offline mode")

tests: dict[str, tuple[str, str]] = {}
# How often the patch ran.
calls = {"segment_attention": 0, "perceiver_attention": 0, "linear_cross_entropy": 0, "dora_combine": 0}


def pytest_configure() -> None:
    """transformers' tests become the package `transformers_tests`; the two mixins that its source distribution leaves out are empty."""
    folders = Path(os.environ["PEERS_FOLDER"]).glob("transformers-*/tests")
    add_module("transformers_tests", [str(folder) for folder in folders])
    for folder, file, mixin in (("exporters", "test_export", "ExportTesterMixin"), ("generation", "test_utils", "GenerationTesterMixin")):
        add_module(f"transformers_tests.{folder}", [])
        setattr(add_module(f"transformers_tests.{folder}.{file}", []), mixin, type(mixin, (), {}))


def add_module(name: str, path: list[str]) -> ModuleType:
    module = sys.modules[name] = ModuleType(name)
    module.__path__ = path
    return module


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Both runs of a test see the same random numbers."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Where tests set huggingface_hub's constant themselves, too."""
    with mock.patch("huggingface_hub.constants.is_offline_mode", return_value=True):
        yield


@pytest.fixture(scope="session", autouse=True)
def patched() -> Iterator[None]:
    if os.environ["PEERS_PATCHED"] != "1":
        yield
        return
    import idefics2_fast

    with count_calls(), every_dora_layer(), idefics2_fast.patch_classes(strict=True):
        yield


@contextmanager
def count_calls() -> Iterator[None]:
    from idefics2_fast import ops

    def counted(name: str, op: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return op(*args, **kwargs)

        return call

    with mock.patch.multiple(ops, **{name: counted(name, getattr(ops, name)) for name in calls}):
        yield


@contextmanager
def every_dora_layer() -> Iterator[None]:
    """PEFT's layers get the patch's DoRA as they are made, as `idefics2_fast.patch` gives it to those of a model."""
    from peft.tuners.lora import LoraLayer

    from idefics2_fast.patching.dora import Unsupported, dora_variant
    from idefics2_fast.row_norm import OptimizerSteps

    theirs = LoraLayer.update_layer

    def update_layer(layer: LoraLayer, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        theirs(layer, adapter_name, *args, **kwargs)
        try:
            layer.lora_variant[adapter_name] = dora_variant(layer, adapter_name)
        except Unsupported:
            pass  # PEFT's own stays

    steps = OptimizerSteps()
    with mock.patch.object(LoraLayer, "update_layer", update_layer):
        yield
    steps.remove()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed and any(sign in report.longreprtext for sign in OFFLINE):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, "Skipped: downloads from a hub")
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext[-2000:]
        tests[report.nodeid] = max(
            tests.get(report.nodeid, ("passed", "")), (report.outcome, why), key=lambda test: OUTCOMES.index(test[0])
        )


def pytest_sessionfinish() -> None:
    Path(os.environ["PEERS_OUTCOMES"]).write_text(json.dumps({"tests": tests, "calls": calls}))
