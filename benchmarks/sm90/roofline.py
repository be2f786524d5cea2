"""Floors: how fast an H100 could run each op at best, by the bytes that it must move and the FLOPs that it must compute.

    python -m idefics2_fast.benchmarks.sm90.roofline            # prints docs/performance.md
    python -m idefics2_fast.benchmarks.sm90.roofline --write    # writes it

The formulas are checked, at small shapes, against what the compiled kernels requested and computed (`tests/sm90/test_roofline.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
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


def embedding(tokens: int, width: int, *, images: int = 0, noise: bool = False, itemsize: int = 2) -> Work:
    """Every row read from the table or from the features, and written; `images` rows of them have their place in the list of features."""
    return Work(0, 2 * itemsize * tokens * width + 8 * tokens * (3 if noise else 1))


def embedding_backward(tokens: int, vocabulary: int, width: int, *, itemsize: int = 2) -> Work:
    """Every gradient read, every row of the table's gradient written; places sorted by token."""
    return Work(0, itemsize * width * (tokens + vocabulary) + 8 * (tokens + 2 * vocabulary))


@dataclass(frozen=True)
class Line:
    """A line of the table: what is run, the least work, the goal in microseconds.

    `kernels`: those with products, by their key in the table of resources -> what each computes, as a share of the least FLOPs; more than
    1 in all where something is computed twice. `stream`: the kernel of an op without products.
    """

    title: str
    work: Work
    goal: float | None
    kernels: Mapping[str, float] = field(default_factory=dict)
    stream: str = ""


ATTENTION, CONTEXT, EMBEDDING = "perceiver_attention/half 96/1 image", "perceiver_context/half 16384/1 image", "embedding/half 65536"
LINES = [
    Line("K/V of 3 layers, 4900 patches", perceiver_context(4900, 4096, 2304), 135, {f"{CONTEXT}/_forward": 1.0}),
    Line(
        "the same, backward",
        perceiver_context(4900, 4096, 2304, backward=True),
        None,
        {f"{CONTEXT}/_backward_x": 0.5, f"{CONTEXT}/_backward_weight": 0.5},
    ),
    Line("resampler attention, 1 image", perceiver_attention(1, 4900), 10, {f"{ATTENTION}/_forward": 1.0}),
    Line("resampler attention, 8 images", perceiver_attention(8, 4900), 35, {f"{ATTENTION}/_forward": 1.0}),
    Line(
        "resampler attention backward, 8 images",
        perceiver_attention(8, 4900, backward=True),
        110,
        {f"{ATTENTION}/_backward_kv": 4 / 5, f"{ATTENTION}/_backward_q": 3 / 5},
    ),
    Line("embedding + NEFTune + merge, 8192 tokens", embedding(8192, 4096, noise=True), 50, stream=f"{EMBEDDING}/noise/embedding_forward"),
    Line(
        "embedding backward, 8192 tokens, 32003 rows",
        embedding_backward(8192, 32003, 4096),
        None,
        stream=f"{EMBEDDING}/plain/embedding_table_grad",
    ),
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
    return max(sum(line.work.flops * share / rates[kernel] for kernel, share in line.kernels.items()), line.work.bytes / MEMORY)


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
    found = {}
    for kernel in {kernel for line in lines for kernel in line.kernels}:
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
