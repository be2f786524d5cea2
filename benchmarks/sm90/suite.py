"""The sm90 suite: floors and predictions for an H100, the compiled kernels against their design, and, on such a card, times.

A card's output is held against the op's reference in fp32 before it is timed. Figures without a card carry the device's name `PAPER`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from idefics2_fast import ops
from idefics2_fast.benchmarks.case import ENGINE, Case, Figure, Figures, LeftOut, Row, Scope
from idefics2_fast.benchmarks.sm90 import resources, roofline
from idefics2_fast.benchmarks.timing import Call, Watch
from idefics2_fast.kernels.segments import Segments

SUITE = "sm90"
PAPER = "H100 SXM, on paper"
FLOOR, PREDICTION, GOAL = "floor", "predicted, unmeasured", "goal"
TURNS = 100  # of a kernel in one measurement: one alone takes no longer than the clock's reading
TOLERANCE = 2e-2  # relative, of bf16


def cases(scope: Scope) -> Iterator[Case | Figures | LeftOut]:
    lines = list(scope.first(roofline.LINES))
    rates = roofline.rates(lines)
    for line in lines:
        yield Figures(SUITE, line.title, of_line(line, rates), device=PAPER)
    if not scope.quick:
        _, rows = resources.recorded_table()  # which a test keeps equal to what is compiled, in minutes
        missed = [fault for key, row in rows.items() for fault in resources.faults(key, row)]
        figures = [Figure("kernels compiled", len(rows), ""), Figure("faults against their design", len(missed), "", 0, at_least=False)]
        yield Figures(SUITE, "compiled kernels", figures, device=PAPER)
    if scope.device.type == "cuda" and torch.cuda.get_device_capability(scope.device) == (9, 0):
        yield from (timed(line.title, scope.device) for line in lines)
    else:
        yield LeftOut(SUITE, "times", "they need a card of compute capability 9.0")


def of_line(line: roofline.Line, rates: Mapping[str, float]) -> list[Figure]:
    _, rows = resources.recorded_table()
    made = [
        Figure(FLOOR, line.work.floor, "s", note=line.work.bound),
        Figure(PREDICTION, roofline.prediction(line, rows, rates), "s", note="a model, fitted on a published GEMM"),
    ]
    return made + ([Figure(GOAL, line.goal * 1e-6, "s")] if line.goal else [])


# --- on a card ---


@dataclass(frozen=True)
class Shapes:
    """Of Idefics2-8B; a test takes smaller ones."""

    patches: int = 4900
    hidden: int = 4096
    outs: int = 2304
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 96
    latents: int = 64
    tokens: int = 8192
    vocabulary: int = 32003


Op = Callable[..., Tensor]


def work(title: str, device: torch.device, shapes: Shapes) -> tuple[str, Op, list[Tensor], bool]:
    """What a line of the table runs: the op's name, the op, its inputs, and whether it is the backward pass that counts."""

    def drawn(*shape: int) -> Tensor:
        return (torch.randn(*shape, device=device) * shape[-1] ** -0.5).bfloat16().requires_grad_()

    backward = "backward" in title or "the same" in title
    if title.startswith(("K/V", "the same")):
        inputs = [drawn(shapes.patches, shapes.hidden), drawn(shapes.outs, shapes.hidden)]
        return "perceiver_context", lambda x, weight: ops.perceiver_context(x, weight, 1e-5), inputs, backward
    if title.startswith("resampler"):
        images = Segments.of_lengths([shapes.patches] * (8 if "8 images" in title else 1), device)
        q = drawn(len(images.lengths) * shapes.latents, shapes.heads, shapes.head_dim)
        context = [drawn(images.total, shapes.kv_heads, shapes.head_dim) for _ in range(2)]
        own = [drawn(q.shape[0], shapes.kv_heads, shapes.head_dim) for _ in range(2)]
        return (
            "perceiver_attention",
            lambda *x: ops.perceiver_attention(*x, images, scale=shapes.head_dim**-0.5),
            [q, *context, *own],
            backward,
        )
    ids = torch.randint(1, shapes.vocabulary, (shapes.tokens,), device=device)
    rows = torch.arange(shapes.tokens // 4, device=device)
    documents = Segments.of_lengths([shapes.tokens], device)
    noise = None if backward else ops.Noise.of(documents, alpha=5.0, seed=0, step=0)
    inputs = [drawn(shapes.vocabulary, shapes.hidden), drawn(len(rows), shapes.hidden)]
    return "embedding", lambda table, features: ops.embedding(ids, table, features, rows, noise), inputs, backward


def timed(title: str, device: torch.device, shapes: Shapes | None = None) -> Case:
    """The engine's op, `TURNS` times in one measurement."""
    name, op, inputs, backward = work(title, device, shapes or Shapes())
    phase = "backward" if backward else "forward"
    grad = torch.randn_like(op(*inputs))

    def call(watch: Watch) -> Sequence[Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            y = op(*inputs)
            watch.start(phase)
            for _ in range(TURNS):
                made = torch.autograd.grad(y, inputs, grad, retain_graph=True) if backward else [op(*inputs)]
            watch.stop()
        return made

    calls: dict[str, Call] = {ENGINE: call}
    row = Row(title, (phase,), steps=TURNS, pass_="both")
    return Case(SUITE, calls, _near(name, op, inputs, grad, backward), (row,))


def _near(name: str, op: Op, inputs: Sequence[Tensor], grad: Tensor, backward: bool) -> Callable[[str, Sequence[Tensor]], str]:
    exact = [x.detach().float().requires_grad_() for x in inputs]
    with ops.using(**{name: "reference"}):
        y = op(*exact)
        expected = torch.autograd.grad(y, exact, grad.float()) if backward else [y.detach()]

    def check(_: str, actual: Sequence[Tensor]) -> str:
        worst = max(((left.float() - right).norm() / right.norm()).item() for left, right in zip(actual, expected, strict=True))
        return "" if worst <= TOLERANCE else f"off by {worst:.1e}, {TOLERANCE:.0e} is allowed"

    return check
