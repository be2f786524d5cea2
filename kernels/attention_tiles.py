"""What the Triton attention kernels share: tiles of rows whose head dim is two pieces, each a power of two, and products of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def columns(pointer, rows, inside, STRIDE: tl.constexpr, H: tl.constexpr, FIRST: tl.constexpr, D: tl.constexpr):
    """Columns FIRST to FIRST + D of rows at `pointer`; zeros beyond column H and where not `inside`."""
    column = FIRST + tl.arange(0, D)
    mask = inside[:, None]
    if H < FIRST + D:
        mask = mask & (column < H)[None, :]
    return tl.load(pointer + rows[:, None] * STRIDE + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_columns(pointer, rows, inside, values, STRIDE: tl.constexpr, H: tl.constexpr, FIRST: tl.constexpr, D: tl.constexpr):
    column = FIRST + tl.arange(0, D)
    mask = inside[:, None] & (column < H)[None, :]
    tl.store(pointer + rows[:, None] * STRIDE + column[None, :], values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, ACC: tl.constexpr):
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACC)


@triton.jit
def add_dot(a, b, acc, ACC: tl.constexpr):
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=ACC)


def pieces(dim: int) -> dict[str, int]:
    """A head dim as two powers of two, each at least 16: 96 = 64 + 32, 72 = 64 + 16 (8 of them padding), 128 = 64 + 64."""
    first = max(16, triton.next_power_of_2(dim) // 2)
    return {"D1": first, "D2": max(16, triton.next_power_of_2(dim - first) if dim > first else 0)}


def whole(dim: int) -> dict[str, int]:
    """A head dim as one power of two."""
    return {"WIDTH": triton.next_power_of_2(dim)}


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Of what is accumulated."""
    return {torch.float32: tl.float32, torch.float64: tl.float64}[dtype]
