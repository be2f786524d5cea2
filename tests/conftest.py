"""What all tests share: no network, helpers under the name `support`, and tests marked `cuda` skipped where there is no device."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, which share the cores; read when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

# The folder tests/ itself stays off sys.path: no process may see tests/kernels as the package `kernels` of another project.
support = ModuleType("support")
support.__path__ = [str(Path(__file__).parent / "support")]
sys.modules["support"] = support


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
