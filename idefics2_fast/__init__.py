"""Idefics2 without padding: a lean engine for training and running Idefics2-class vision-language models.

Names load at first use, so that importing the package costs little more than importing torch.
"""

from __future__ import annotations

import importlib

_HOMES = {
    "Batch": "batch",
    "Generation": "generate",
    "Idefics2": "model",
    "Idefics2Config": "config",
    "PackedImages": "images",
    "Processor": "processor",
    "Segments": "kernels.segments",
    "pack_images": "images",
    "patch": "patching",
    "patch_classes": "patching",
    "register_attention": "patching",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'idefics2_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"idefics2_fast.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
