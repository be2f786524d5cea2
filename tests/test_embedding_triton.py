"""The embedding's Triton kernels without a card: interpreted in fp32 and fp64, and compiled for Hopper and executed on the CPU in bf16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from idefics2_fast.benchmarks.sm90.faults import OutOfBounds
from idefics2_fast.benchmarks.sm90.launches import chosen, compile, executed, interpreted, launches, recorded
from idefics2_fast.kernels import embedding_triton
from idefics2_fast.kernels.embedding import Noise, cpu, reference
from idefics2_fast.kernels.embedding_triton import embedding, embedding_forward, embedding_table_grad
from idefics2_fast.kernels.philox import uniform
from idefics2_fast.kernels.segments import Segments
from idefics2_fast.kernels.tuned import config

Inputs = dict[str, Tensor | Noise | None]


def inputs(tokens: int, width: int, dtype: torch.dtype, *, vocabulary: int = 9, images: bool = True, seed: int = 0) -> Inputs:
    """Documents of 0 to 6 tokens and one longer, repeated tokens, every third row an image's, token indices beyond 32 bits."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda rows: torch.randn(rows, width, generator=draw, dtype=torch.float64).to(dtype)  # noqa: E731
    lengths = [0, *[1, 6, 3][: tokens // 10], tokens - sum([1, 6, 3][: tokens // 10])]
    rows = torch.randperm(tokens, generator=draw)[: tokens // 3] if images else None
    return {
        "token_ids": torch.randint(0, vocabulary, (tokens,), generator=draw),
        "table": normal(vocabulary),
        "features": normal(len(rows)) if images else None,
        "image_rows": rows,
        "noise": Noise.of(Segments.of_lengths(lengths), alpha=5.0, seed=2**63 + seed, step=2**32 - 1 - seed, token_base=2**32 - 3),
    }


def results(function, given: Inputs, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """Output and gradients, computed in `dtype`."""
    cast = lambda x: None if x is None else x.to(dtype).requires_grad_()  # noqa: E731
    table, features = cast(given["table"]), cast(given["features"])
    y = function(given["token_ids"], table, features, given["image_rows"], given["noise"], **options)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16().to(y)
    leaves = {name: leaf for name, leaf in (("table", table), ("features", features)) if leaf is not None}
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True))


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


# --- in the interpreter ---


SHAPES = {
    "tokens": st.integers(0, 24),
    "width": st.integers(1, 300),
    "vocabulary": st.integers(1, 12),
    "images": st.booleans(),
    "padded": st.booleans(),
    "noised": st.sampled_from(["none", "text", "all", "injected"]),
}


@settings(max_examples=4, deadline=None)
@given(**SHAPES)
def test_output_and_gradients_are_the_references(tokens, width, vocabulary, images, padded, noised):
    check_interpreted(tokens, width, vocabulary, images, padded, noised)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(**SHAPES)
def test_more_outputs_and_gradients_are_the_references(tokens, width, vocabulary, images, padded, noised):
    check_interpreted(tokens, width, vocabulary, images, padded, noised)


def check_interpreted(tokens, width, vocabulary, images, padded, noised):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        given = inputs(tokens, width, dtype, vocabulary=vocabulary, images=images)
        values = torch.randn(tokens, width, dtype=dtype) if noised == "injected" else None
        given["noise"] = None if noised == "none" else replace(given["noise"], images=noised == "all", values=values)
        options = {"padding_idx": vocabulary - 1 if padded else None}
        expected = results(reference, given, torch.float64, **options)
        with launches(interpreted()):
            actual = results(embedding, given, dtype, **options)
        assert {name: error(actual[name], value) <= tolerance for name, value in expected.items()} == dict.fromkeys(expected, True)


def test_the_noise_has_the_generators_bits():
    """Seeds, steps and token indices of more than 31 and 32 bits."""
    for seed, step, base, width in (
        (0, 0, 0, 8),
        (-3, 2**32 - 1, 2**31 - 2, 10),
        (2**64 - 1, 5, 2**32 - 2, 257),
        (1 << 40, 7, 2**40, 4100),
    ):
        noise = Noise.of(Segments.of_lengths([4]), alpha=2.0 * width**0.5, seed=seed, step=step, token_base=base)  # the scale is 1
        with launches(interpreted()):
            y = embedding(None, torch.zeros(4, width), noise=noise)
        assert torch.equal(y, uniform(seed, step, base + torch.arange(4), width) * noise_scale(noise, width))


def noise_scale(noise: Noise, width: int) -> Tensor:
    return (noise.lengths[:1] * width).float().sqrt().reciprocal() * noise.alpha


# --- compiled for Hopper ---

# 4900 tokens: some rows of them
SHAPES = [(tokens, width) for tokens in (1, 70, 301) for width in (36, 257, 1152)] + [(1, 4096), (14, 4096), (4900, 36), (0, 36)]


@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_the_compiled_forward_has_the_references_bits(tokens, width):
    """In bf16: no error but the rounding of the reference itself."""
    given = inputs(tokens, width, torch.bfloat16)
    with launches(executed(chosen(40) if tokens > 1000 else None)) as run:
        actual = embedding_triton.forward(**given)
    ran = torch.ones(tokens, dtype=torch.bool)
    if tokens > 1000:
        ran = torch.zeros_like(ran).index_fill(0, torch.tensor([x for x, _, _ in chosen(40)(run.launches[0])]), True)
    assert torch.equal(actual[ran], reference(**given)[ran])
    assert actual.isnan()[~ran].all()


@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_the_compiled_gradient_errs_no_more_than_torch(tokens, width):
    """At most twice the error of the bf16 path on a CPU, against fp64; sums of up to 600 places, in a table with rows of no token."""
    given = inputs(tokens, width, torch.bfloat16, vocabulary=12)
    grad = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    with launches(executed()):
        actual = embedding_triton.table_grad(grad, given["token_ids"], given["image_rows"], 12, None)
    table = {dtype: given["table"].to(dtype).requires_grad_() for dtype in (torch.float64, torch.bfloat16)}
    exact, same = (
        torch.autograd.grad(
            function(given["token_ids"], table[dtype], given["features"].to(dtype), given["image_rows"]), table[dtype], grad.to(dtype)
        )[0]
        for function, dtype in ((reference, torch.float64), (cpu, torch.bfloat16))
    )
    assert error(actual, exact) <= 2 * error(same, exact)
    assert ((actual == 0).all(1) == (exact == 0).all(1)).all()


def hopper(tokens: int, width: int, vocabulary: int, dtype: torch.dtype, images: bool) -> executed:
    given = inputs(tokens, width, dtype, vocabulary=vocabulary, images=images)
    with launches(executed()) as run:
        embedding_triton.forward(**given)
        embedding_triton.table_grad(torch.zeros(tokens, width, dtype=dtype), given["token_ids"], given["image_rows"], vocabulary, None)
    return run


def test_bytes_and_widths_at_the_models_shape():
    """Every row once, in accesses of 16 bytes: within 1.1 x of the least, threads that read the same number counted one by one."""
    tokens, width, vocabulary = 24, 4096, 16
    run = hopper(tokens, width, vocabulary, torch.bfloat16, True)
    text, row = tokens - tokens // 3, width * 2
    least = [2 * tokens * row + 3 * 8 * tokens, (vocabulary + text) * row + 4 * (vocabulary + 1) + 8 * text]
    for counts, fewest in zip(run.counts, least, strict=True):
        assert fewest <= counts.bytes() <= 1.1 * fewest
        assert counts.bank_conflicts == 0
    rows = {"out", "table", "features", "grad"}
    assert {width for counts in run.counts for (_, name, width) in counts.requested if name in rows} == {16}


def test_the_machine_code():
    """No spills, no shared memory, and rows loaded 16 bytes at a time."""
    given = inputs(4, 4096, torch.bfloat16)
    with launches(recorded()) as record:
        embedding_triton.forward(**given)
        embedding_triton.table_grad(torch.zeros(4, 4096).bfloat16(), given["token_ids"], given["image_rows"], 9, None)
    for launch in record.launches:
        kernel = compile(launch)
        assert (kernel.stack, kernel.shared) == (0, 0)
        assert kernel.registers <= 128
        assert "STL" not in kernel.sass
        assert kernel.sass.count("LDG.E.128") >= 8


@pytest.mark.parametrize("kernel", ["forward, output", "forward, table", "gradient, table", "gradient, rows"])
def test_offsets_are_of_64_bits(kernel):
    """Row 2^20 of 4096 columns is not there. An offset of 32 bits would come round to row 0, which is."""
    far, row = 2**20, torch.zeros(1, 4096, dtype=torch.bfloat16)
    out, tiles = torch.full_like(row, 7), {"WIDTH": 4096, "WIDE": embedding_triton._wide(row), "enable_fp_fusion": False}
    places, starts = torch.zeros(far + 1, dtype=torch.int64), torch.zeros(far + 2, dtype=torch.int32)
    at = far if kernel in ("forward, output", "gradient, table") else 0
    places[0], starts[1] = (far, 1) if at == 0 else (0, 0)
    tiles |= config("embedding", "forward" if kernel.startswith("forward") else "table_grad", row.dtype, 4096)
    nothing = dict.fromkeys(("lengths", "tokens", "values")) | dict.fromkeys(("seed_low", "seed_high", "step"), 0)

    def launch() -> None:
        if kernel.startswith("forward"):
            embedding_forward[far + 1, 1](out, places, row, row, **nothing, ALPHA=0.0, IMAGES=False, **tiles)
        else:
            embedding_table_grad[far + 1, 1](out, row, places, starts, PADDING=-1, **tiles)

    with launches(executed(lambda _: [(at, 0, 0)])), pytest.raises(OutOfBounds):
        launch()


# --- as an operator of torch ---


@pytest.mark.slow
def test_opcheck():
    given = inputs(4, 8, torch.float32)
    noise, table, features = given["noise"], given["table"].requires_grad_(), given["features"].requires_grad_()
    drawn = noise.lengths, noise.tokens, None, 5.0, 3, 4, False
    with launches(interpreted()):
        torch.library.opcheck(
            torch.ops.idefics2_fast.embedding_triton, (given["token_ids"], table, features, given["image_rows"], *drawn, None)
        )
        torch.library.opcheck(
            torch.ops.idefics2_fast.embedding_triton_table_grad, (torch.randn(4, 8), given["token_ids"], given["image_rows"], 9, 3)
        )


def test_one_graph_and_the_same_bits_twice():
    given = inputs(6, 40, torch.float32)
    with launches(interpreted()):
        first, again = (results(embedding, given, torch.float32) for _ in range(2))
        compiled = results(torch.compile(embedding, fullgraph=True, backend="aot_eager"), given, torch.float32)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, compiled[name])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 36), (301, 1152), (4900, 4096)])
def test_on_a_card(tokens, width, dtype):
    """The forward pass has the CPU's bits; the gradient errs at most twice as much as the CPU's, and has the same bits twice."""
    given = inputs(tokens, width, dtype)
    moved = {name: value.cuda() for name, value in given.items() if isinstance(value, Tensor)}
    noise = replace(given["noise"], lengths=given["noise"].lengths.cuda(), tokens=given["noise"].tokens.cuda())
    actual, again = (results(embedding, {**moved, "noise": noise}, dtype) for _ in range(2))
    same, exact = results(cpu, given, dtype), results(reference, given, torch.float64)
    assert torch.equal(actual["y"].cpu(), same["y"])
    assert torch.equal(actual["features"].cpu(), same["features"])
    assert torch.equal(actual["table"], again["table"])
    assert error(actual["table"].cpu(), exact["table"]) <= 2 * error(same["table"], exact["table"])
