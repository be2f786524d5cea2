"""What every kernel must do whatever it computes: checks for the tests of each, on a CPU with its launches interpreted or executed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def check_operator(operator: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """`torch.library.opcheck` of a custom operator: its schema, its gradient's registration, its fake, and all under AOT dispatch.

    The launches run for real, so call it inside of `launches(interpreted())` or `launches(executed())`.
    """
    torch.library.opcheck(operator, tuple(arguments), test_utils=OPCHECKS)


def check_permuted(function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """The same bits for dense tensors whose axes lie in memory in another order."""
    expected = _tensors(function(*arguments))
    for index, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and argument.ndim > 1:
            permuted = [*arguments]
            permuted[index] = argument.detach().transpose(0, -1).contiguous().transpose(0, -1)
            assert permuted[index].stride() != argument.stride() or 1 in argument.shape, "the layout has changed"
            assert _same(_tensors(function(*permuted)), expected), f"argument {index} in another layout gives other values"


def check_fullgraph(function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """`torch.compile(fullgraph=True)` traces it without a break, and gives the same bits. The tracing alone is tested, not a backend."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert _same(_tensors(compiled(*arguments)), _tensors(function(*arguments)))


def check_fake(function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Fake tensors give fake outputs of the real ones' shapes, dtypes and strides, and launch nothing."""
    real = _tensors(function(*arguments))
    with FakeTensorMode() as mode:
        fake = _tensors(function(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments)))
    kinds = [[(x.shape, x.dtype, x.stride()) for x in outputs] for outputs in (fake, real)]
    assert kinds[0] == kinds[1]


def check_deterministic(function: Callable[..., Any], arguments: Sequence[Any], times: int = 2) -> None:
    """The same bits each time, of outputs and gradients."""
    first = _with_gradients(function, arguments)
    for _ in range(times - 1):
        assert _same(_with_gradients(function, arguments), first)


def check_fork(function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """A child forked after the first use computes the same bits: it needs none of the locks, threads or handles that the parent holds."""
    expected = _tensors(function(*arguments))
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_answer, args=(answers, function, arguments))
    child.start()
    # As lists of bytes: sharing tensors with a process that ends needs handles of its own.
    answer = answers.get(timeout=120)
    child.join(timeout=60)
    assert child.exitcode == 0
    assert answer == [_bits(x) for x in expected]


def _answer(answers: Any, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    answers.put([_bits(x) for x in _tensors(function(*arguments))])


def _with_gradients(function: Callable[..., Any], arguments: Sequence[Any]) -> list[Tensor]:
    fresh = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in arguments]
    leaves = [x for x in fresh if isinstance(x, Tensor) and x.requires_grad]
    outputs = _tensors(function(*fresh))
    wanted = [x for x in outputs if x.requires_grad]
    gradients = torch.autograd.grad(wanted, leaves, [torch.ones_like(x) for x in wanted]) if leaves else ()
    return [*outputs, *gradients]


def _tensors(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if isinstance(x, Tensor)]


def _bits(x: Tensor) -> bytes:
    return x.detach().contiguous().view(torch.uint8).numpy().tobytes()


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return [_bits(x) for x in ours] == [_bits(x) for x in theirs]
