"""Linear layer and cross-entropy on a GPU: formula, legend and the loop over chunks in `linear_cross_entropy.py`.

The products are the library's, in the operands' precision. V may be odd, so logits [r, V] stand in rows whose pitch is a multiple of 128
bytes: every row, and every access of 16 bytes, is aligned. One kernel, a program a row, takes a row's maximum and sum as it reads, and
overwrites the logits with their gradient at once. A row that fits into one block is read once; of a wider one, all blocks but the last are
read again. There are no atomics, and nothing waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_fast.kernels.linear_cross_entropy import operator, sum_and_count
from idefics2_fast.kernels.tuned import config

OP = "linear_cross_entropy"
# Rows of logits begin at multiples of so many columns: 32003 -> 32064.
PITCH = 64


# --- device ---


@triton.jit
def _block(row, start, V: tl.constexpr, PITCH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Columns of a block and their logits; minus infinity beyond V. Reads up to the pitch, so that whole vectors are read."""
    column = start + tl.arange(0, BLOCK)
    z = tl.load(row + column, mask=column < PITCH, other=0.0).to(WIDE)
    return column, tl.where(column < V, z, -float("inf"))


@triton.jit
def _give(row, column, exponentials, target, scale, weight, counted, PITCH: tl.constexpr):
    """Overwrites a block with its gradient, what lies beyond V with zeros."""
    dz = exponentials * scale - tl.where(column == target, weight, 0.0)
    tl.store(row + column, tl.where(counted, dz, 0.0).to(row.dtype.element_ty), mask=column < PITCH)


@triton.jit
def _softmax(
    logits, targets, row_weights, losses, lse,
    IGNORED: tl.constexpr, Z_LOSS: tl.constexpr, GRADIENT: tl.constexpr,
    V: tl.constexpr, PITCH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Row `program 0`: its loss, its lse, and its gradient in the logits' place."""
    LAST: tl.constexpr = (V - 1) // BLOCK * BLOCK
    at = tl.program_id(0)
    row = logits + at.to(tl.int64) * PITCH
    target = tl.load(targets + at)
    counted = target != IGNORED
    target = tl.where(counted, target, 0)
    chosen = tl.load(row + target).to(WIDE)
    weight = tl.full((), 1.0, WIDE) if row_weights is None else tl.load(row_weights + at).to(WIDE)

    largest = tl.full((), -float("inf"), WIDE)
    total = tl.zeros((), WIDE)
    for start in range(0, LAST, BLOCK):
        _, z = _block(row, start, V, PITCH, BLOCK, WIDE)
        larger = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(z - larger), 0)
        largest = larger
    column, z = _block(row, LAST, V, PITCH, BLOCK, WIDE)
    larger = tl.maximum(largest, tl.max(z, 0))
    exponentials = tl.exp(z - larger)
    total = total * tl.exp(largest - larger) + tl.sum(exponentials, 0)

    logarithm = tl.log(total)
    of_row = logarithm + larger
    loss = weight * (logarithm - (chosen - larger) + Z_LOSS * of_row * of_row)
    tl.store(losses + at, tl.where(counted, loss, 0.0))
    tl.store(lse + at, of_row)
    if GRADIENT:
        scale = weight * (1.0 + 2.0 * Z_LOSS * of_row) / total
        _give(row, column, exponentials, target, scale, weight, counted, PITCH)
        for start in range(0, LAST, BLOCK):
            column, z = _block(row, start, V, PITCH, BLOCK, WIDE)
            _give(row, column, tl.exp(z - larger), target, scale, weight, counted, PITCH)


# --- host ---


def room(like: Tensor, classes: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Memory for logits, seen as [V, rows]: a row of logits is a column of it, and the pitch its stride."""
    return like.new_empty(rows, triton.cdiv(classes, PITCH) * PITCH, dtype=dtype)[:, :classes].T


def losses(logits: Tensor, targets: Tensor, row_weights: Tensor | None, ignore_index: int, z_loss: float, gradient: bool) -> Tensor:
    """The losses [r] of logits [V, r] out of `room`, whose memory is taken: where `gradient`, by the gradient of the losses' sum."""
    return softmax(logits, targets, row_weights, ignore_index, z_loss, gradient)[0]


def softmax(
    logits: Tensor, targets: Tensor, row_weights: Tensor | None, ignore_index: int, z_loss: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Losses and lse [r], fp32 (fp64 for fp64); see `losses`."""
    (classes, rows), pitch = logits.shape, logits.stride(1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    out = logits.new_empty(rows, dtype=wide), logits.new_empty(rows, dtype=wide)
    whole_rows = logits.as_strided((rows, pitch), (pitch, 1))  # with what lies between them
    row_weights = None if row_weights is None else row_weights.contiguous()
    shape = {"V": classes, "PITCH": pitch, "WIDE": {torch.float32: tl.float32, torch.float64: tl.float64}[wide]}
    rule = {"IGNORED": ignore_index, "Z_LOSS": z_loss, "GRADIENT": gradient, "enable_fp_fusion": True}
    tiles = config(OP, "softmax", logits.dtype, classes)
    _softmax[(rows,)](whole_rows, targets.contiguous(), row_weights, *out, **rule, **shape, **tiles)
    return out


_forward = operator("linear_cross_entropy_triton", room, losses)


def fused(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, row_weights: Tensor | None = None, ignore_index: int = -100, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `linear_cross_entropy.chunked`, by Triton."""
    return sum_and_count(_forward, hidden, weight, targets, row_weights, ignore_index, z_loss)
