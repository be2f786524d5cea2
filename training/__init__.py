"""The trainer: recipes, data, parallelism, checkpoints. It imports the model; nothing in the model imports it.

    from idefics2_fast.training import fit, instruct

    fit(instruct("HuggingFaceM4/idefics2-8b", "my.jsonl", "runs/a"))

Names load at first use, as the package's own.
"""

from __future__ import annotations

import importlib

_HOMES = {"Fitted": "run", "GuardError": "guard", "Recipe": "recipe", "fit": "run", "instruct": "recipe"}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'idefics2_fast.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"idefics2_fast.training.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
