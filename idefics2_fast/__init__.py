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
    "ImageLimits": "image_limits",
    "PackedImages": "images",
    "Processor": "processor",
    "Segments": "kernels.segments",
    "attach_adapters": "adapters",
    "load_adapters": "adapter_files",
    "merge_adapters": "adapters",
    "pack_images": "images",
    "patch": "patching",
    "patch_classes": "patching",
    "register_attention": "patching",
    "save_adapters": "adapter_files",
    "unmerge_adapters": "adapters",
    "use_adapter": "adapters",
}

_ROOMS = ("training",)  # packages beside this one, at hand as its attributes

__all__ = sorted((*_HOMES, *_ROOMS))


def __getattr__(name: str) -> object:
    if name in _ROOMS:
        return importlib.import_module(f"idefics2_fast.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'idefics2_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"idefics2_fast.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
