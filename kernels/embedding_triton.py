"""Token embedding, image merge and NEFTune on a GPU: formula and legend in `embedding.py`.

Forward: a program reads one token's row, of the table or of the features, adds the noise, and writes it. The noise has the bits of
`kernels/philox.py` and the sum is not fused, so that the result has the bits of the reference.

Backward: places sorted by token, then a program a row of the table sums the gradients of that token's places in their order and writes the
row, zeros too. There are no atomics and no other pass over the table. Grids follow from shapes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_fast.kernels.embedding import Noise, differentiable
from idefics2_fast.kernels.tuned import config

OP = "embedding"


@triton.jit
def _uniform(column, token, step, seed_low, seed_high):
    """Four words for each block of four columns, as signed integers side by side: U(-1, 1) times 2^31."""
    seed = (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | seed_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    zero = tl.zeros(column.shape, tl.uint32)
    c0, c1, c2, c3 = (
        column.to(tl.uint32),
        zero + token.to(tl.uint32),
        zero + (token >> 32).to(tl.uint32),
        zero + step.to(tl.uint32, bitcast=True),
    )
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return words.reshape(4 * column.shape[0]).to(tl.int32, bitcast=True)


@triton.jit
def _reciprocal_root(x):
    """1 / sqrt(x) of a scalar, both steps rounded to nearest as on a CPU."""
    if x.dtype == tl.float64:
        return 1.0 / tl.sqrt(x)
    return tl.div_rn(tl.full((), 1.0, tl.float32), tl.sqrt_rn(x))


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step"])
def embedding_forward(
    out, places, table, features, lengths, tokens, values, seed_low, seed_high, step,
    ALPHA: tl.constexpr, IMAGES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Row `program 0`, columns of block `program 1`. A place is a row of the table, or ~i for row i of the features."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = tl.load(places + row)
    if place < 0:
        x = tl.load(features + ~place * WIDTH + column, mask=inside, other=0.0)
    else:
        x = tl.load(table + place * WIDTH + column, mask=inside, other=0.0)
    if lengths is not None:
        length = tl.load(lengths + row)
        if not IMAGES:
            length = tl.where(place < 0, 0, length)
        scale = tl.where(length > 0, _reciprocal_root((tl.maximum(length, 1) * WIDTH).to(WIDE)) * ALPHA, 0.0)
        if values is None:
            quad = tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
            drawn = _uniform(quad, tl.load(tokens + row), step, seed_low, seed_high).to(tl.float32).to(WIDE)
            scale *= 2.0**-31  # exact, so the product has the same bits
        else:
            drawn = tl.load(values + row * WIDTH + column, mask=inside, other=0.0).to(WIDE)
        x = x.to(WIDE) + drawn * scale
    tl.store(out + row * WIDTH + column, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def embedding_table_grad(
    out, grad, order, starts,
    PADDING: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Row `program 0` of the table, columns of block `program 1`: the rows order[starts[row]:starts[row + 1]] summed, ROWS at a time."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    first = tl.load(starts + token)
    last = tl.where(token == PADDING, first, tl.load(starts + token + 1))
    total = tl.zeros((BLOCK,), WIDE)
    for start in range(first, last, ROWS):
        at = start + tl.arange(0, ROWS)
        rows = tl.load(order + at, mask=at < last, other=0)
        mask = (at < last)[:, None] & inside[None, :]
        total += tl.sum(tl.load(grad + rows[:, None] * WIDTH + column[None, :], mask=mask, other=0.0).to(WIDE), 0)
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=inside)


def forward(token_ids: Tensor | None, table: Tensor, features: Tensor | None, image_rows: Tensor | None, noise: Noise | None) -> Tensor:
    """The output [T, C]; arguments as `reference` has them."""
    table = table.contiguous()
    features = table if features is None else features.contiguous()
    tokens, width = (table if token_ids is None else token_ids).shape[0], table.shape[1]
    out = table.new_empty(tokens, width)
    if out.numel() == 0:
        return out
    places = torch.arange(tokens, device=table.device) if token_ids is None else token_ids.contiguous()
    if image_rows is not None:
        places = places.index_copy(0, image_rows, ~torch.arange(image_rows.shape[0], device=table.device))
    drawn, settings = (None, None, None, 0, 0, 0), {"ALPHA": 0.0, "IMAGES": False}
    if noise is not None:
        values = None if noise.values is None else noise.values.contiguous()
        words = (_signed(word) for word in (noise.seed, noise.seed >> 32, noise.step))
        drawn = noise.lengths.contiguous(), noise.tokens.contiguous(), values, *words
        settings = {"ALPHA": noise.alpha, "IMAGES": noise.images}
    tiles = config(OP, "forward", table.dtype, width)
    embedding_forward[tokens, triton.cdiv(width, tiles["BLOCK"])](
        out, places, table, features, *drawn, **settings, WIDTH=width, WIDE=_wide(table), **tiles, enable_fp_fusion=False
    )
    return out


def table_grad(grad: Tensor, token_ids: Tensor, image_rows: Tensor | None, size: int, padding_idx: int | None) -> Tensor:
    """The table's gradient [V, C] of `grad` [T, C]."""
    grad, width = grad.contiguous(), grad.shape[1]
    out = grad.new_empty(size, width)
    if out.numel() == 0:
        return out
    text = token_ids if image_rows is None else token_ids.index_fill(0, image_rows, -1)
    tokens, order = text.sort(stable=True)
    starts = torch.searchsorted(tokens, torch.arange(size + 1, device=grad.device), out_int32=True)
    tiles = config(OP, "table_grad", grad.dtype, width)
    padding = -1 if padding_idx is None else padding_idx
    embedding_table_grad[size, triton.cdiv(width, tiles["BLOCK"])](
        out, grad, order, starts, PADDING=padding, WIDTH=width, WIDE=_wide(grad), **tiles, enable_fp_fusion=False
    )
    return out


def _signed(word: int) -> int:
    """The lowest 32 bits, as the int32 that Triton passes."""
    return (word + 2**31) % 2**32 - 2**31


def _wide(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


embedding = differentiable("embedding_triton", forward, table_grad)
