"""The loss of a padded batch of which a tenth is answers: full logits as transformers makes them, torch's own fused loss, this engine's.

`python -m idefics2_fast.benchmarks.linear_cross_entropy` times loss and gradient together and prints what must hold. A provider whose loss
or gradient is off the exact one by more than 1e-6 of its largest value gets no time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from idefics2_fast import ops
from idefics2_fast.benchmarks.model import Case, Row
from idefics2_fast.benchmarks.record import default_path, device_name, versions, write_records
from idefics2_fast.benchmarks.report import ENGINE, case_table, records, verdicts
from idefics2_fast.benchmarks.timing import Call, Watch, measure

VOCABULARY = 32003
TOKENS, WIDTH = 2048, 1024
ANSWERS = 0.1
HEADS = ("frozen", "trained")
HF, TORCH, TORCH_CHUNKED = "hf", "torch", "torch, chunked"
ACCURACY = 1e-6

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def hf_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """transformers': logits of all rows."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(F.linear(hidden, weight), labels, weight.shape[0])


def torch_loss(hidden: Tensor, weight: Tensor, labels: Tensor, options: torch.nn.LinearCrossEntropyOptions | None = None) -> Tensor:
    """torch's linear_cross_entropy of the answer rows."""
    rows, targets = ops.answer_rows(hidden, labels)
    return F.linear_cross_entropy(rows, weight, targets, options=options)


def torch_chunked_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return torch_loss(hidden, weight, labels, torch.nn.LinearCrossEntropyOptions())


def engine_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    rows, targets = ops.answer_rows(hidden, labels)
    total, count = ops.linear_cross_entropy(rows, weight, targets)
    return total / count


LOSSES: dict[str, Loss] = {HF: hf_loss, TORCH: torch_loss, TORCH_CHUNKED: torch_chunked_loss, ENGINE: engine_loss}


def loss_case(head: str, device: torch.device) -> Case:
    """A head that is frozen, as with adapters, or trained."""
    hidden, weight, labels = _inputs(device)
    inputs = [hidden.requires_grad_()] if head == "frozen" else [hidden.requires_grad_(), weight.requires_grad_()]
    calls = {name: _call(loss, hidden, weight, labels, inputs) for name, loss in LOSSES.items()}
    name = f"{head} head, {TOKENS} tokens, {ANSWERS:.0%} answers, {WIDTH} x {VOCABULARY} fp32"
    row = Row(name, ("loss",), needs={HF: 6.0, TORCH: 1.0}, memory={HF: 1 / 8}, pass_="both")
    return Case(
        "linear_cross_entropy",
        calls,
        _near(inputs, hidden, weight, labels),
        (row if head == "frozen" else replace(row, needs={}, memory={}),),
    )


def _inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, TOKENS // 2, WIDTH, generator=draw)
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw) * WIDTH**-0.5
    labels = torch.randint(0, VOCABULARY, (2, TOKENS // 2), generator=draw)
    labels[torch.rand(2, TOKENS // 2, generator=draw) >= ANSWERS] = -100
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
        pairs = zip(outputs, expected, strict=True)
        error = max(((actual - value).abs().max() / value.abs().max()).item() for actual, value in pairs)
        return "" if error <= ACCURACY else f"off by {error:.1e}, {ACCURACY:.0e} is allowed"

    return check


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where a provider's output was wrong or a requirement does not hold."""
    options = _parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device_name(device)}; " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    held = []
    for case in (loss_case(head, device) for head in options.heads or HEADS):
        results = measure(case.calls, case.check, device=device, seconds=options.seconds, rounds=(3, 25), title=case.suite)
        print(f"\n{case_table(case, results)}", flush=True)
        held += [holds for row in case.rows for holds in verdicts(row, results).values()]
        held.append(not any(result.wrong for result in results.values()))
        if options.out is not None:
            write_records(options.out, records(case, results, device))
    return int(not all(held))


def _head(name: str) -> str:
    if name not in HEADS:
        raise argparse.ArgumentTypeError(f"no head {name!r}: expected {', '.join(HEADS)}")
    return name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m idefics2_fast.benchmarks.linear_cross_entropy", description=__doc__.splitlines()[0])
    parser.add_argument("heads", nargs="*", type=_head, metavar="head", help=f"{', '.join(HEADS)}; both where none is named")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each case may take")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", default=default_path(device), help="JSON lines to add to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
