"""The sm90 suite: floors and predictions for an H100, the compiled kernels against their design, and, on such a card, times.

A card's output is held against the op's reference in fp32 before it is timed. Figures without a card carry the device's name `PAPER`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from idefics2_fast import ops
from idefics2_fast.benchmarks.accuracy import off_by
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
        yield from (timed(line, scope.device) for line in lines if line.op.__name__ in WORKS)
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


Op = Callable[..., Tensor]


@dataclass(frozen=True)
class Work:
    """What a line of the table runs.

    Attributes:
        name: the engine's op, whose reference the output is held against.
        op: of the inputs; those that need gradients are differentiated.
        exact: the same for the reference, where its arguments are others.
    """

    name: str
    op: Op
    inputs: Sequence[Tensor]
    exact: Op | None = None


def _drawn(device: torch.device, *shape: int, frozen: bool = False) -> Tensor:
    return (torch.randn(*shape, device=device) * shape[-1] ** -0.5).bfloat16().requires_grad_(not frozen)


def _segment_attention(device: torch.device, *, rows: int, heads: int = 16, head_dim: int = 72) -> Work:
    rule = {"causal": False, "scale": head_dim**-0.5}
    images = Segments.of_lengths([rows], device)
    inputs = [_drawn(device, rows, heads, head_dim) for _ in range(3)]
    return Work("segment_attention", lambda q, k, v: ops.segment_attention(q, k, v, images, **rule), inputs)


def _perceiver_context(device: torch.device, *, rows: int, width: int, outs: int) -> Work:
    inputs = [_drawn(device, rows, width), _drawn(device, outs, width)]
    return Work("perceiver_context", lambda x, weight: ops.perceiver_context(x, weight, 1e-5), inputs)


def _perceiver_attention(
    device: torch.device, *, images: int, patches: int, latents: int = 64, heads: int = 16, kv_heads: int = 4, head_dim: int = 96
) -> Work:
    segments = Segments.of_lengths([patches] * images, device)
    counts = [segments.total] * 2 + [images * latents] * 2
    inputs = [_drawn(device, images * latents, heads, head_dim), *(_drawn(device, rows, kv_heads, head_dim) for rows in counts)]
    return Work("perceiver_attention", lambda *x: ops.perceiver_attention(*x, segments, scale=head_dim**-0.5), inputs)


def _adapter(device: torch.device, width: int, outs: int, rank: int) -> list[Tensor]:
    """W, frozen, A and B."""
    return [_drawn(device, outs, width, frozen=True), _drawn(device, rank, width), _drawn(device, outs, rank)]


def _dora_linear(device: torch.device, *, rows: int, width: int, outs: int, rank: int) -> Work:
    weight, a, b = _adapter(device, width, outs, rank)
    norm = ops.dora_norm(weight, a, b, 0.25)
    inputs = [_drawn(device, rows, width), weight, a, b, norm.clone().requires_grad_()]
    return Work(
        "dora_linear",
        lambda x, *adapter: ops.dora_linear(x, *adapter, scaling=0.25, norm=norm),
        inputs,
        lambda x, *adapter: ops.dora_linear(x, *adapter, scaling=0.25),
    )


def _dora_norm(device: torch.device, *, outs: int, width: int, rank: int) -> Work:
    weight, a, b = _adapter(device, width, outs, rank)
    square = ops.dora_square(weight)
    return Work(
        "dora_linear",
        lambda *adapter: ops.dora_norm(*adapter, 0.25, square),
        [weight, a, b],
        lambda weight, a, b: (weight + 0.25 * b @ a).norm(dim=1),
    )


def _embedding(device: torch.device, *, tokens: int, width: int, vocabulary: int = 32003, noise: bool = False) -> Work:
    """A quarter of the tokens are image features."""
    ids = torch.randint(1, vocabulary, (tokens,), device=device)
    rows = torch.arange(tokens // 4, device=device)
    drawn = ops.Noise.of(Segments.of_lengths([tokens], device), alpha=5.0, seed=0, step=0) if noise else None
    inputs = [_drawn(device, vocabulary, width), _drawn(device, len(rows), width)]
    return Work("embedding", lambda table, features: ops.embedding(ids, table, features, rows, drawn), inputs)


def _linear_cross_entropy(device: torch.device, *, rows: int, width: int, classes: int) -> Work:
    targets = torch.randint(classes, (rows,), device=device)
    inputs = [_drawn(device, rows, width), _drawn(device, classes, width, frozen=True)]
    return Work("linear_cross_entropy", lambda hidden, weight: ops.linear_cross_entropy(hidden, weight, targets)[0], inputs)


# by the roofline's formula; the softmax runs within the loss alone
WORKS: dict[str, Callable[..., Work]] = {
    "segment_attention": _segment_attention,
    "perceiver_context": _perceiver_context,
    "perceiver_attention": _perceiver_attention,
    "dora_linear": _dora_linear,
    "dora_norm": _dora_norm,
    "embedding": _embedding,
    "embedding_backward": _embedding,
    "linear_cross_entropy": _linear_cross_entropy,
}


def timed(line: roofline.Line, device: torch.device) -> Case:
    """The engine's op, `TURNS` times in one measurement."""
    shape = dict(line.shape)
    backward = shape.pop("backward", line.op is roofline.embedding_backward)
    work = WORKS[line.op.__name__](device, **shape)
    phase, inputs = "backward" if backward else "forward", work.inputs
    leaves = [x for x in inputs if x.requires_grad]
    grad = torch.randn_like(work.op(*inputs))

    def call(watch: Watch) -> Sequence[Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            y = work.op(*inputs)
            watch.start(phase)
            for _ in range(TURNS):
                made = torch.autograd.grad(y, leaves, grad, retain_graph=True) if backward else [work.op(*inputs)]
            watch.stop()
        return made

    calls: dict[str, Call] = {ENGINE: call}
    row = Row(line.title, (phase,), steps=TURNS, pass_="both")
    return Case(SUITE, calls, _near(work, grad, backward), (row,))


def _near(work: Work, grad: Tensor, backward: bool) -> Callable[[str, Sequence[Tensor]], str]:
    exact = [x.detach().float().requires_grad_(x.requires_grad) for x in work.inputs]
    with ops.using(**{work.name: "reference"}):
        y = (work.exact or work.op)(*exact)
        leaves = [x for x in exact if x.requires_grad]
        expected = torch.autograd.grad(y, leaves, grad.float()) if backward else [y.detach()]

    def check(_: str, actual: Sequence[Tensor]) -> str:
        return off_by(actual, expected, TOLERANCE)

    return check
