"""The loss of a padded batch of which a tenth is answers: full logits as transformers makes them, torch's own fused loss, this engine's.

Loss and gradient together. A provider whose loss or gradient is off the exact one by more than a logit's rounding, of its largest value,
gets no time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from idefics2_fast import ops
from idefics2_fast.benchmarks.accuracy import off_by
from idefics2_fast.benchmarks.case import ENGINE, Case, Row, Scope
from idefics2_fast.benchmarks.timing import Call, Watch

VOCABULARY = 32003
TOKENS, WIDTH = 2048, 1024
QUICK = 256
ANSWERS = 0.1
HEADS = ("frozen", "trained")
HF, TORCH, TORCH_CHUNKED, LIGER = "hf", "torch", "torch, chunked", "liger"
ACCURACY = torch.finfo(torch.float32).eps * WIDTH**0.5  # of a sum of so many products

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(scope: Scope) -> Iterator[Case]:
    """A head that is frozen, as with adapters, and one that is trained."""
    yield from scope.first(loss_case(head, scope.device, tokens=QUICK if scope.quick else TOKENS) for head in HEADS)


def hf_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """transformers': logits of all rows."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(F.linear(hidden, weight), labels, weight.shape[0])


def torch_loss(hidden: Tensor, weight: Tensor, labels: Tensor, options: object = None) -> Tensor:
    """torch's linear_cross_entropy of the answer rows."""
    rows, targets = ops.answer_rows(hidden, labels)
    return F.linear_cross_entropy(rows, weight, targets, options=options)


def torch_chunked_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return torch_loss(hidden, weight, labels, torch.nn.LinearCrossEntropyOptions())


def engine_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    rows, targets = ops.answer_rows(hidden, labels)
    total, count = ops.linear_cross_entropy(rows, weight, targets)
    return total / count


def liger_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    rows, targets = ops.answer_rows(hidden, labels)
    return LigerFusedLinearCrossEntropyLoss()(weight, rows, targets)


LOSSES: dict[str, Loss] = {HF: hf_loss, TORCH: torch_loss, TORCH_CHUNKED: torch_chunked_loss, LIGER: liger_loss, ENGINE: engine_loss}


def absent(device: torch.device) -> dict[str, str]:
    """Losses that this torch lacks, or that are not installed, or run on a card alone."""
    missing = {}
    if not hasattr(F, "linear_cross_entropy"):
        missing |= dict.fromkeys((TORCH, TORCH_CHUNKED), f"torch {torch.__version__} has no linear_cross_entropy")
    if not importlib.util.find_spec("liger_kernel"):
        missing[LIGER] = "liger-kernel is not installed"
    elif device.type != "cuda":
        missing[LIGER] = "it needs a CUDA device"
    return missing


def loss_case(head: str, device: torch.device, answers: float = ANSWERS, tokens: int = TOKENS) -> Case:
    """A padded batch of two rows, of which a share is answers."""
    hidden, weight, labels = _inputs(device, answers, tokens)
    missing = absent(device)
    inputs = [hidden.requires_grad_()] if head == "frozen" else [hidden.requires_grad_(), weight.requires_grad_()]
    calls = {name: _call(loss, hidden, weight, labels, inputs) for name, loss in LOSSES.items() if name not in missing}
    name = f"{head} head, {tokens} tokens, {answers:.0%} answers, {WIDTH} x {VOCABULARY} fp32"
    row = Row(name, ("loss",), needs={HF: 6.0, TORCH: 1.0}, memory={HF: 1 / 8}, pass_="both")
    return Case(
        "linear_cross_entropy",
        calls,
        _near(inputs, hidden, weight, labels),
        (row if head == "frozen" else replace(row, needs={}, memory={}),),
        missing,
    )


def _inputs(device: torch.device, answers: float, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, tokens // 2, WIDTH, generator=draw)
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw) * WIDTH**-0.5
    labels = torch.randint(0, VOCABULARY, (2, tokens // 2), generator=draw)
    labels[torch.rand(2, tokens // 2, generator=draw) >= answers] = -100
    return hidden.to(device), weight.to(device), labels.to(device)


def _call(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor, inputs: Sequence[Tensor]) -> Call:
    def call(watch: Watch) -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.enable_grad():
            watch.start("loss")
            value = loss(hidden, weight, labels)
            gradients = torch.autograd.grad(value, inputs)
            watch.stop()
            return value.detach(), *gradients

    return call


def _near(inputs: Sequence[Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> Callable[[str, tuple[Tensor, ...]], str]:
    """A check of loss and gradients against those in fp64."""
    exact = {id(x): x.detach().double().requires_grad_(x.requires_grad) for x in (hidden, weight)}
    with ops.using(linear_cross_entropy="reference"):
        value = engine_loss(exact[id(hidden)], exact[id(weight)], labels)
    gradients = torch.autograd.grad(value, [exact[id(x)] for x in inputs])
    expected = [value.detach(), *gradients]

    def check(name: str, outputs: tuple[Tensor, ...]) -> str:
        return off_by(outputs, expected, ACCURACY, order=torch.inf)

    return check
