"""What a patch changed, and how it is taken back."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

log = logging.getLogger("idefics2_fast")
_ABSENT = object()


class Ledger:
    """Changes in the order they were made. `undo` takes them back, the last first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def replace(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Makes `module.name(...)` call `function(module, original, ...)`, on this instance alone.

        The signature stays the original's. Where accelerate's hooks stand before `forward`, they stay before it. What stands there is a
        `functools.partial` of a function of this package and of the module: copies and pickles of the module keep it, bound to the copy.
        """
        name = "_old_forward" if name == "forward" and "_old_forward" in vars(module) else name
        original = getattr(module, name)
        wrapper = functools.update_wrapper(functools.partial(function, module, original), original)
        self.put(vars(module), name, wrapper)

        def step_aside() -> None:
            """For whoever wrapped the wrapper since and calls it still."""
            wrapper.__setstate__((original, (), {}, {}))

        self._undo.append(step_aside)

    def replace_in_class(self, cls: type, name: str, function: Callable[..., Any]) -> None:
        """As `replace` for every instance of a class."""
        original = getattr(cls, name)

        @functools.wraps(original)
        def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return function(self, original.__get__(self), *args, **kwargs)

        setattr(cls, name, wrapper)
        self._undo.append(lambda: setattr(cls, name, original))

    def put(self, mapping: dict[str, Any], key: str, value: Any) -> None:
        """Sets an entry. It is undone where it still is this value."""
        old = mapping.get(key, _ABSENT)
        mapping[key] = value

        def undo() -> None:
            if mapping.get(key) is not value:
                return
            if old is _ABSENT:
                del mapping[key]
            else:
                mapping[key] = old

        self._undo.append(undo)

    def later(self, undo: Callable[[], None]) -> None:
        """Notes what else is to be done when all is taken back."""
        self._undo.append(undo)

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()


def by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call as keywords."""
    return kwargs | dict(zip(inspect.signature(function).parameters, args, strict=False)) if args else kwargs


def patched_names(module: nn.Module) -> Iterator[str]:
    """Attributes of a module that are this package's."""
    for name, value in vars(module).items():
        if isinstance(value, functools.partial) and getattr(value.func, "__module__", "").startswith(__package__):
            yield name


@functools.cache
def warn_once(reason: str) -> None:
    log.warning("Hugging Face's own path runs: %s", reason)


def fall_back(reason: str, *, strict: bool) -> None:
    """One log line a reason.

    Raises:
        ValueError: under `strict`.
    """
    if strict:
        raise ValueError(f"{reason} (strict=True)")
    warn_once(reason)


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether calling `module` is nothing but `cls.forward` on its own weights: no subclass, no hook, no forward of its own."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is cls and not hooks and "forward" not in vars(module)
