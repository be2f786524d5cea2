"""One linear layer under DoRA, forward and backward: what it costs beyond the frozen layer, here and by PEFT.

Every call of this engine computes the norms anew, as the first pass after an optimizer step does. A provider whose output or gradients are
not PEFT's gets no time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from idefics2_fast.benchmarks.accuracy import off_by
from idefics2_fast.benchmarks.case import ENGINE, Case, Figure, Figures, Row, Scope
from idefics2_fast.benchmarks.timing import Call, Measurement, Watch, quantiles
from idefics2_fast.patching.dora import dora_variant
from idefics2_fast.row_norm import OptimizerSteps, expire

# (out, in) of Mistral's attention and MLP projections.
SHAPES = ((4096, 4096), (14336, 4096))
QUICK = (1024, 1024)
TOKENS, RANK, ALPHA = 1024, 64, 16
FROZEN, PEFT, KEPT = "frozen", "peft", f"{ENGINE}, norms kept"
PHASES = ("forward", "backward")
TIME, MEMORY = 0.35, 0.25  # of PEFT's overhead, at most


def cases(scope: Scope) -> Iterator[Case]:
    """Each shape, and the first with dropout too."""
    shapes = [QUICK] if scope.quick else SHAPES
    steps = OptimizerSteps()
    try:
        yield from (layer_case(shape, 0.0, scope.device) for shape in shapes)
        if not scope.quick:
            yield layer_case(shapes[0], 0.1, scope.device)
    finally:
        steps.remove()


def layer_case(shape: tuple[int, int], dropout: float, device: torch.device, rank: int = RANK) -> Case:
    """PEFT's layer, a twin that shares its parameters but computes by this engine, and the frozen layer beneath both."""
    out, width = shape
    theirs = _peft_layer(nn.Linear(width, out, bias=False, device=device), dropout, rank)
    ours = copy.copy(theirs)
    ours.lora_variant = {"default": dora_variant(theirs, "default")}
    x = torch.randn(TOKENS, width, device=device, requires_grad=True)
    grad = torch.randn(TOKENS, out, device=device)
    leaves = [x, *(parameter for parameter in theirs.parameters() if parameter.requires_grad)]

    def call(layer: nn.Module, leaves: Sequence[Tensor], fresh: bool = False) -> Call:
        def run(watch: Watch) -> list[Tensor]:
            torch.manual_seed(0)  # of dropout
            if fresh:
                expire()
            with torch.inference_mode(False), torch.enable_grad():
                watch.start("forward")
                y = layer(x)
                watch.start("backward")
                return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

        return run

    calls = {FROZEN: call(theirs.base_layer, [x]), PEFT: call(theirs, leaves), ENGINE: call(ours, leaves, True), KEPT: call(ours, leaves)}
    name = f"{out}x{width}, {TOKENS} tokens, rank {rank}" + (f", dropout {dropout}" if dropout else "")
    rows = (*(Row(name, (phase,), pass_=phase) for phase in PHASES), Row(name, PHASES, pass_="both"))
    derived = partial(overheads, name, judged=not dropout) if shape in SHAPES else None  # differences of small times say nothing
    return Case("dora_linear", calls, _same_as(calls[PEFT](Watch(device))), rows, derived=derived)


def _peft_layer(base: nn.Linear, dropout: float, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=dropout, use_dora=True, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(nn.Sequential(base), config).base_model.model[0]


def _same_as(expected: Sequence[Tensor]) -> Callable[[str, Sequence[Tensor]], str]:
    def check(name: str, actual: Sequence[Tensor]) -> str:
        return "" if name == FROZEN else off_by(actual, expected, 1e-5)

    return check


def time_overhead(results: Mapping[str, Measurement], name: str) -> list[float]:
    """Time beyond the frozen layer as a part of PEFT's, round by round."""
    rounds = zip(*(results[provider].seconds(PHASES) for provider in (FROZEN, PEFT, name)), strict=True)
    return [(own - frozen) / (peft - frozen) for frozen, peft, own in rounds]


def memory_overhead(results: Mapping[str, Measurement], name: str) -> float | None:
    """Peak memory beyond the frozen layer's as a part of PEFT's."""
    frozen, peft, own = (results[provider].peak(PHASES) for provider in (FROZEN, PEFT, name))
    return None if own is None else (own - frozen) / (peft - frozen)


def overheads(case: str, results: Mapping[str, Measurement], judged: bool) -> Figures:
    """What the engine costs beyond the frozen layer, as parts of what PEFT costs beyond it."""
    made = []
    for name in (ENGINE, KEPT):
        limits = (TIME, MEMORY) if judged and name == ENGINE else (None, None)
        low, median, high = quantiles(time_overhead(results, name))
        made.append(Figure("time overhead against peft", median, "x", limits[0], False, low, high, name))
        if (memory := memory_overhead(results, name)) is not None:
            made.append(Figure("memory overhead against peft", memory, "x", limits[1], False, provider=name))
    return Figures("dora_linear", case, made)
