"""What a patch changed, and how it is taken back."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

log = logging.getLogger("idefics2_fast")
_ABSENT = object()


class Patched:
    """A function of this package in place of a module's method: `module.name(...)` calls `function(module, original, ...)`.

    It looks like the method, `__self__`, `__func__` and signature included, so that whoever wraps methods wraps it as one. Unlike a method
    it can be pickled where it stands. A copy of the module holds one of its own, bound to the copy, which the same undo takes away; one
    out of a pickle has no ledger.
    """

    def __init__(self, module: nn.Module, name: str, function: Callable[..., Any], ledger: Ledger | None) -> None:
        self.module, self.name, self.function, self.ledger = module, name, function, ledger
        self.original = getattr(module, name)
        self.replaces = name in vars(module)
        self.stands = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, self.original, *args, **kwargs) if self.stands else self.original(*args, **kwargs)

    @property
    def __self__(self) -> nn.Module:
        return self.module

    @property
    def __func__(self) -> Callable[..., Any]:
        def method(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        method.__signature__ = self.__signature__.replace(parameters=[own, *self.__signature__.parameters.values()])
        return method

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @property
    def __name__(self) -> str:
        return self.name

    def __deepcopy__(self, memo: dict[int, Any]) -> Patched:
        memo[id(self)] = twin = object.__new__(Patched)
        for key in ("module", "name", "function", "original", "replaces", "stands"):
            setattr(twin, key, copy.deepcopy(getattr(self, key), memo))
        twin.ledger = self.ledger
        if self.ledger is not None:
            self.ledger.later(twin.remove)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"ledger": None}

    def remove(self) -> None:
        """Gives the place back to whoever had it. Who wrapped this since, and calls it still, is served by the original."""
        self.stands = False
        entries = vars(self.module)
        for name in [name for name, value in entries.items() if value is self]:
            if name == self.name and not self.replaces:
                del entries[name]
            else:
                entries[name] = self.original


class Ledger:
    """Changes in the order they were made. `undo` takes them back, the last first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def replace(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Makes `module.name(...)` call `function(module, original, ...)`, on this instance alone.

        Where accelerate's hooks stand before `forward`, they stay before it. See `Patched` for what copies and pickles of the module keep.
        """
        name = "_old_forward" if name == "forward" and "_old_forward" in vars(module) else name
        patched = Patched(module, name, function, self)
        vars(module)[name] = patched
        self._undo.append(patched.remove)

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
    """What of a module a patch has replaced that can still be undone."""
    for name, value in (vars(module) | vars(module).get("lora_variant", {})).items():
        if isinstance(value, Patched) or _is_variant(value):
            if value.ledger is not None:
                yield name


def take_off_orphans(model: nn.Module) -> None:
    """Gives back what came patched out of a pickle, or, of PEFT's layers, out of a copy: nobody else can undo it."""
    for module in model.modules():
        for value in list(vars(module).values()):
            if isinstance(value, Patched):
                value.remove()
        variants = vars(module).get("lora_variant", {})
        for name, value in variants.items():
            if _is_variant(value):
                variants[name] = type(value).__base__()


def _is_variant(value: object) -> bool:
    return type(value).__module__ == f"{__package__}.dora"


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
