"""Floors: how fast an H100 could run each op at best, by the bytes that it must move and the FLOPs that it must compute.

    python -m idefics2_fast.benchmarks.sm90.roofline            # prints docs/performance.md
    python -m idefics2_fast.benchmarks.sm90.roofline --write    # writes it

The formulas are checked, at small shapes, against what the compiled kernels requested and computed (`tests/sm90/test_roofline.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from idefics2_fast.benchmarks.sm90 import pipes, resources
from idefics2_fast.benchmarks.sm90.resources import Resources

# Of an H100 SXM, as a good kernel sees them: dense bf16 products and reads of its memory. Nominal: 989 TFLOP/s and 3.35 TB/s.
TENSOR = 800e12
MEMORY = 3.0e12
LATENCY = 0.8e-6  # seconds from a request to global memory to its data, under load
LAUNCH = 2.5e-6  # seconds between the starts of two small kernels outside of a CUDA graph; no part of a floor

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


@dataclass(frozen=True)
class Work:
    """The least that an op must do: FLOPs of its products, bytes read and written once."""

    flops: float
    bytes: float

    @property
    def floor(self) -> float:
        """Seconds."""
        return max(self.flops / TENSOR, self.bytes / MEMORY)

    @property
    def bound(self) -> str:
        return "compute" if self.flops / TENSOR > self.bytes / MEMORY else "memory"


def perceiver_context(rows: int, width: int, outs: int, *, backward: bool = False, itemsize: int = 2) -> Work:
    """One product [rows, width] x [width, outs]; backward: one for each of its operands."""
    product = 2 * rows * width * outs
    x, weight, y = rows * width, width * outs, rows * outs
    if backward:
        return Work(2 * product, itemsize * (2 * y + 2 * x + 2 * weight) + 4 * rows)
    return Work(product, itemsize * (x + weight + y) + 4 * rows)


def segment_attention(rows: int, *, heads: int = 16, head_dim: int = 72, backward: bool = False) -> Work:
    """Two products of every query with every key of one segment; backward five."""
    product, x, statistics = 2 * rows**2 * heads * head_dim, 2 * rows * heads * head_dim, 4 * rows * heads
    return Work(5 * product, 8 * x + statistics) if backward else Work(2 * product, 4 * x + statistics)


def perceiver_attention(
    images: int, patches: int, *, latents: int = 64, heads: int = 16, kv_heads: int = 4, head_dim: int = 96, backward: bool = False
) -> Work:
    """Two products of a query with each of an image's keys, its own latents among them; backward five."""
    keys, queries = images * (patches + latents), images * latents
    product = 2 * (patches + latents) * queries * heads * head_dim
    q, k = 2 * queries * heads * head_dim, 2 * keys * kv_heads * head_dim
    statistics = 4 * queries * heads
    if backward:
        return Work(5 * product, 4 * q + 4 * k + statistics)
    return Work(2 * product, 2 * q + 2 * k + statistics)


def dora_norm(outs: int, width: int, rank: int, *, itemsize: int = 2) -> Work:
    """W read once, beside it A, B, the squares' sums and the norms in fp32; one product of width r."""
    return Work(2 * outs * width * rank, itemsize * outs * width + 4 * rank * (outs + width) + 8 * outs)


def dora_linear(rows: int, width: int, outs: int, rank: int, *, backward: bool = False, itemsize: int = 2) -> Work:
    """The base's product and the two of width r; backward one and four, for dx, dh, dA and dB."""
    base, x, y, adapter = 2 * rows * width * outs, rows * width, rows * outs, rank * (width + outs)
    if backward:
        return Work(base + 4 * rows * adapter, itemsize * (2 * y + 2 * x + width * outs + adapter) + 4 * adapter)
    return Work(base + 2 * rows * adapter, itemsize * (x + y + width * outs + adapter))


def embedding(tokens: int, width: int, *, images: int = 0, noise: bool = False, itemsize: int = 2) -> Work:
    """Every row read from the table or from the features, and written; `images` rows of them have their place in the list of features."""
    return Work(0, 2 * itemsize * tokens * width + 8 * tokens * (3 if noise else 1))


def embedding_backward(tokens: int, vocabulary: int, width: int, *, itemsize: int = 2) -> Work:
    """Every gradient read, every row of the table's gradient written; places sorted by token."""
    return Work(0, itemsize * width * (tokens + vocabulary) + 8 * (tokens + 2 * vocabulary))


def linear_cross_entropy(rows: int, width: int, classes: int, *, itemsize: int = 2) -> Work:
    """Loss and gradient by the rows of a frozen head: two products, the head read for each, and the logits' way through memory.

    Logits are written by one product, read and overwritten by the softmax, read by the other product.
    """
    hidden, head, logits = rows * width, classes * width, rows * classes
    return Work(4 * hidden * classes, itemsize * (hidden + 2 * head + 4 * logits) + 4 * hidden)


def softmax(rows: int, classes: int, *, itemsize: int = 2) -> Work:
    """Logits read once and overwritten by their gradient; a target, a loss and an lse each row."""
    return Work(0, 2 * itemsize * rows * classes + 16 * rows)


@dataclass(frozen=True)
class Line:
    """A line of the table: what is run, and the goal in microseconds.

    `op`, `shape`: one of the formulas above, and its arguments. `kernels`: those with products, by their key in the table of resources ->
    what each computes, as a share of the least FLOPs; more than 1 in all where something is computed twice. `passes`: bytes moved by
    kernels that run before or after the library's products. `stream`: the kernel of an op without products.
    """

    title: str
    op: Callable[..., Work]
    shape: Mapping[str, int | bool]
    goal: float | None = None
    kernels: Mapping[str, float] = field(default_factory=dict)
    passes: float = 0.0
    stream: str = ""

    @property
    def work(self) -> Work:
        return self.op(**self.shape)


LIBRARY = "the library"  # its products run at TENSOR


def _dora_by_the_library(outs: int, width: int, *, goal: float, backward_goal: float) -> list[Line]:
    """Forward: y is read and written for h's product, and for the scale; backward: dy and y read, z written, dx read and written."""
    shape = {"rows": 8192, "width": width, "outs": outs, "rank": 64}
    x, y, which = 2 * 8192 * width, 2 * 8192 * outs, f"{outs} x {width}, rank 64, 8192 tokens"
    return [
        Line(f"DoRA {which}", dora_linear, shape, goal, {LIBRARY: 1.0}, passes=4 * y),
        Line(f"DoRA backward {which}", dora_linear, shape | {"backward": True}, backward_goal, {LIBRARY: 1.0}, passes=3 * y + 2 * x),
    ]


SEGMENTS, PADDED = "segment_attention/half 72/images", 80 / 72  # of 64 + 16 columns, 8 are padding
ATTENTION, CONTEXT, EMBEDDING = "perceiver_attention/half 96/1 image", "perceiver_context/half 16384/1 image", "embedding/half 65536"
DORA, CROSS = "dora_linear/half 64/1024 columns", 2.0  # A's two terms
KV = {"rows": 4900, "width": 4096, "outs": 2304}
CE = {"rows": 2048, "classes": 32003}
LINES = [
    Line("vision attention, 4900 patches", segment_attention, {"rows": 4900}, 276, {f"{SEGMENTS}/_forward": PADDED}),
    Line(
        "vision attention backward, 4900 patches",
        segment_attention,
        {"rows": 4900, "backward": True},
        864,
        {f"{SEGMENTS}/_backward_kv": 4 / 5 * PADDED, f"{SEGMENTS}/_backward_q": 3 / 5 * PADDED},
    ),
    Line("K/V of 3 layers, 4900 patches", perceiver_context, KV, 135, {f"{CONTEXT}/_forward": 1.0}),
    Line(
        "K/V of 3 layers backward, 4900 patches",
        perceiver_context,
        KV | {"backward": True},
        None,
        {f"{CONTEXT}/_backward_x": 0.5, f"{CONTEXT}/_backward_weight": 0.5},
    ),
    Line("resampler attention, 1 image", perceiver_attention, {"images": 1, "patches": 4900}, 10, {f"{ATTENTION}/_forward": 1.0}),
    Line("resampler attention, 8 images", perceiver_attention, {"images": 8, "patches": 4900}, 35, {f"{ATTENTION}/_forward": 1.0}),
    Line(
        "resampler attention backward, 8 images",
        perceiver_attention,
        {"images": 8, "patches": 4900, "backward": True},
        110,
        {f"{ATTENTION}/_backward_kv": 4 / 5, f"{ATTENTION}/_backward_q": 3 / 5},
    ),
    Line(
        "DoRA 14336 x 1152, rank 64, 4900 patches",
        dora_linear,
        {"rows": 4900, "width": 1152, "outs": 14336, "rank": 64},
        None,
        {f"{DORA}/_forward": 1.0},
    ),
    *_dora_by_the_library(4096, 4096, goal=415, backward_goal=412),
    *_dora_by_the_library(14336, 4096, goal=1330, backward_goal=1800),
    Line("DoRA's norm, 4096 x 4096, rank 64", dora_norm, {"outs": 4096, "width": 4096, "rank": 64}, 13, {f"{DORA}/_cross": CROSS}),
    Line("DoRA's norm, 14336 x 4096, rank 64", dora_norm, {"outs": 14336, "width": 4096, "rank": 64}, 45, {f"{DORA}/_cross": CROSS}),
    Line(
        "embedding + NEFTune + merge, 8192 tokens",
        embedding,
        {"tokens": 8192, "width": 4096, "noise": True},
        50,
        stream=f"{EMBEDDING}/noise/embedding_forward",
    ),
    Line(
        "embedding backward, 8192 tokens, 32003 rows",
        embedding_backward,
        {"tokens": 8192, "vocabulary": 32003, "width": 4096},
        stream=f"{EMBEDDING}/plain/embedding_table_grad",
    ),
    Line(
        "answer-only CE, 2048 rows, forward + dX",
        linear_cross_entropy,
        CE | {"width": 4096},
        1550,
        {LIBRARY: 1.0},
        passes=softmax(**CE).bytes,
    ),
    Line("softmax of answer-only CE, with its gradient", softmax, CE, stream="linear_cross_entropy/half 32768/training/_softmax"),
]


def page(rows: Mapping[str, Resources], rates: Mapping[str, float], fit: str) -> str:
    """docs/performance.md."""
    lines = [
        f"| {line.title} | {line.work.flops / 1e9:.1f} | {line.work.bytes / 1e6:.1f} | {line.work.floor * 1e6:.1f} ({line.work.bound}) "
        f"| {prediction(line, rows, rates) * 1e6:.1f} | {f'{line.goal:g}' if line.goal else '-'} |"
        for line in LINES
    ]
    return PAGE_TEXT.format(
        tensor=TENSOR / 1e12,
        memory=MEMORY / 1e12,
        latency=LATENCY * 1e6,
        clock=pipes.CLOCK / 1e9,
        launch=LAUNCH * 1e6,
        lines="\n".join(lines),
        fit=fit,
        resources=resources.markdown(rows),
    )


def prediction(line: Line, rows: Mapping[str, Resources], rates: Mapping[str, float]) -> float:
    """Seconds: products by the model of the pipes, a stream by what a multiprocessor's threads have under way at a time."""
    if line.stream:
        return line.work.bytes / min(MEMORY, stream_rate(rows[line.stream]))
    products = sum(line.work.flops * share / rates[kernel] for kernel, share in line.kernels.items())
    return max(products, (line.work.bytes - line.passes) / MEMORY) + line.passes / MEMORY


def stream_rate(row: Resources) -> float:
    """Bytes a second that a card full of this kernel can ask for: half of them read, the loads of one turn under way at a time."""
    under_way = row.ctas * row.config["num_warps"] * 32 * sum(int(width) * count for width, count in row.loads.items())
    return 2 * pipes.MULTIPROCESSORS * under_way / LATENCY


PAGE_TEXT = """# Performance on H100, on paper

Nothing on this page was measured on a GPU. Floors follow from shapes, predictions from compiled code and a model; both are generated:
`python -m idefics2_fast.benchmarks.sm90.roofline --write`.

## Floors, predictions, goals

Constants: {tensor:.0f} TFLOP/s dense bf16, {memory:.1f} TB/s, {latency:.1f} us from a request to its data, {clock:.3f} GHz;
a launch outside of a CUDA graph costs about {launch:.1f} us, which is in no number here. FLOPs and bytes are the least that the op must do.
Times in microseconds.

| op | GFLOP | MB | floor | predicted, unmeasured | goal |
|---|---|---|---|---|---|
{lines}

Predictions are for ranking configs: a model of the hot loop's pipes, its one rate fitted on a published GEMM, attention held out.

{fit}

## Resources of the compiled kernels

Every kernel at every shipped config, compiled for sm_90. Products and loads count instructions, the hot loop's length too.

{resources}
"""


def rates(lines: Sequence[Line]) -> dict[str, float]:
    """FLOP/s of the lines' kernels, compiled here, by their key in the table of resources."""
    found = {LIBRARY: TENSOR}
    for kernel in {kernel for line in lines for kernel in line.kernels} - {LIBRARY}:
        op, shape_class, case, name = kernel.split("/")
        launch = next(launch for launch in resources.launches_of(op, shape_class, case) if launch.name == name)
        found[kernel] = pipes.rate(resources.compile(launch))
    return found


def main(arguments: Sequence[str]) -> None:
    """Prints docs/performance.md; `--write` writes it."""
    _, rows = resources.recorded_table()
    text = page(rows, rates(LINES), pipes.report())
    print(text)
    if "--write" in arguments:
        PAGE.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
