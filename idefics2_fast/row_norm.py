"""What DoRA keeps from one forward pass to the next: the norms of its rows, computed once per optimizer step.

In somebody else's training loop nobody says when weights have changed. `RowNorm` looks at the tensors themselves (another object, an
in-place write, other memory) and at a count of optimizer steps, which `OptimizerSteps` keeps: optimizers that write through `.data`, and
FSDP2, whose gathered weight is the same object in the same version after every step, leave no other trace. Where nobody counts, nothing
is kept; nor in evaluation among several processes, where FSDP2 hides loaded weights as well. A write through `.data` outside of an
optimizer is seen at the next step, or when the layer changes between training and evaluation; `expire` makes it seen at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from idefics2_fast import ops


class OptimizerSteps:
    """Counts the steps of all torch optimizers of this process, from now until `remove`."""

    count: ClassVar[int] = 0
    counters: ClassVar[int] = 0
    hook: ClassVar[Any] = None  # one for all who count

    def __init__(self) -> None:
        expire()  # steps before now went uncounted
        if OptimizerSteps.hook is None:
            OptimizerSteps.hook = register_optimizer_step_post_hook(lambda *_: expire())
        OptimizerSteps.counters += 1
        self._counts = True

    def remove(self) -> None:
        """Stops counting; a second call does nothing."""
        if self._counts:
            self._counts = False
            OptimizerSteps.counters -= 1
        if not OptimizerSteps.counters and OptimizerSteps.hook is not None:
            OptimizerSteps.hook.remove()
            OptimizerSteps.hook = None


def expire() -> None:
    """Makes every `RowNorm` compute anew at its next use, as an optimizer step does."""
    OptimizerSteps.count += 1


class RowNorm:
    """||W + s B A|| of one layer's rows, computed at the first use after one of W, A, B or s has changed.

    Gradient checkpointing therefore recomputes with the norm of the first pass, even where an optimizer steps within the backward pass. A
    copy or a pickle starts empty. Compiled code computes the norm in every pass.
    """

    def __init__(self) -> None:
        self._norm, self._square = _Kept(), _Kept()

    def __reduce__(self) -> tuple[type[RowNorm], tuple[()]]:
        return RowNorm, ()

    def __call__(self, weight: Tensor, a: Tensor, b: Tensor, scaling: float, training: bool, rows: Sequence[int] = ()) -> Tensor:
        """The norm, [out] in fp32 (fp64 for fp64), without gradient.

        Args:
            weight, a, b: W [out, in], A [r, in], B [out, r].
            scaling: s.
            training: whether the layer is in training; a change of it makes the norm be computed anew.
            rows: of each of several adapters, where A is theirs one after another; see `block_diagonal`.
        """
        tensors = (weight, a, b)
        if torch.compiler.is_compiling() or not _changes_are_seen(tensors, training):
            return ops.dora_norm(weight, a, block_diagonal(b, rows), scaling)
        with torch.inference_mode(False):  # what is kept may be used in training next
            steps = OptimizerSteps.count
            frozen = (training, steps if weight.requires_grad else None)
            square = lambda: self._square((weight,), frozen, lambda: ops.dora_square(weight))  # noqa: E731
            make = lambda: ops.dora_norm(weight, a, block_diagonal(b, rows), scaling, square())  # noqa: E731
            return self._norm(tensors, (scaling, training, steps), make)


def block_diagonal(b: Tensor, rows: Sequence[int]) -> Tensor:
    """B [out, r] of adapters that have `rows` rows each, as it stands against all their A [adapters * r, in]: [out, adapters * r]."""
    return b if len(rows) < 2 else torch.block_diag(*b.split(list(rows)))


def _changes_are_seen(tensors: tuple[Tensor, ...], training: bool) -> bool:
    processes = torch.distributed.is_available() and torch.distributed.is_initialized()
    return OptimizerSteps.counters > 0 and (training or not processes) and not any(tensor.is_inference() for tensor in tensors)


class _Kept:
    """A value made from tensors, for as long as these and a key stay what they were."""

    def __init__(self) -> None:
        self._entry: tuple[tuple[weakref.ref, ...], tuple, Tensor] | None = None  # replaced whole: threads share layers

    def __call__(self, tensors: tuple[Tensor, ...], key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        """The value that is kept, or a new one. It is kept for the state of before it was made: a tensor that another
        thread writes meanwhile makes it be made again."""
        entry, state = self._entry, _state(tensors, key)
        if entry is not None:
            references, known, value = entry
            same = all(reference() is tensor for reference, tensor in zip(references, tensors, strict=True))
            if same and known == state:
                return value
        value = make()
        self._entry = tuple(map(weakref.ref, tensors)), state, value
        return value


def _state(tensors: tuple[Tensor, ...], key: tuple[Any, ...]) -> tuple[Any, ...]:
    return key, *((tensor._version, tensor.data_ptr()) for tensor in tensors)
