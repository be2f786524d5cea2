"""Keys and values of the perceiver's context on a GPU: formula and legend in `perceiver_context.py`.

Forward, with r = rms(x)^-1: one pass over the rows for r, one product, scaled by r before it is rounded. Backward:

    g = r * dy,   dW = g^T x,   dx = g W - c * x,   c = r^2 / C * sum(dy * y)

one pass over the rows for g and c, one product each for dW and dx. No atomics: the same inputs give the same bits.

The squares are not summed inside the product: Triton 3.9 gives a tile that is both multiplied and read otherwise one buffer too few, and
overwrites it while the tensor cores still read (seen by `benchmarks/sm90`: a write to what an asynchronous operation may still read).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_fast.kernels.tuned import Config, config

OP = "perceiver_context"


# --- device ---


@triton.jit
def _tile(pointer, row, rows, column, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """Elements (row, column) of a dense [rows, COLUMNS]; zeros outside of it. EVEN: no column is outside."""
    mask = (row < rows)[:, None]
    if not EVEN:
        mask = mask & (column < COLUMNS)[None, :]
    return tl.load(pointer + row.to(tl.int64)[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store_tile(pointer, row, rows, column, COLUMNS: tl.constexpr, values):
    mask = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    tl.store(pointer + row.to(tl.int64)[:, None] * COLUMNS + column[None, :], values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _place(COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Rows and columns of a program's tile: the tiles of one block of rows are neighbours, and share it in the cache."""
    BLOCKS: tl.constexpr = (COLUMNS + BN - 1) // BN
    return (tl.program_id(0) // BLOCKS) * BM + tl.arange(0, BM), (tl.program_id(0) % BLOCKS) * BN + tl.arange(0, BN)


@triton.jit
def _rstd(x, rstd, P, EPS: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """r [P]."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    squares = tl.zeros([BM, BN], ACC)
    for start in range(0, C, BN):
        a = _tile(x, row, P, start + tl.arange(0, BN), C, C % BN == 0).to(ACC)
        squares += a * a
    tl.store(rstd + row, 1.0 / tl.sqrt(tl.sum(squares, 1) / C + EPS), mask=row < P)


@triton.jit
def _forward(
    x, weight, y, rstd, P,
    C: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [P, K]."""
    row, out = _place(K, BM, BN)
    acc = tl.zeros([BM, BN], ACC)
    for start in range(0, C, BK):
        column = start + tl.arange(0, BK)
        a = _tile(x, row, P, column, C, C % BK == 0)
        b = _tile(weight, out, K, column, C, C % BK == 0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee", out_dtype=ACC)
    scale = tl.load(rstd + row, mask=row < P, other=0.0)
    _store_tile(y, row, P, out, K, acc * scale[:, None])


@triton.jit
def _backward_rows(grad, y, rstd, g, c, P, C: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """g [P, K] and c [P]."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    scale = tl.load(rstd + row, mask=row < P, other=0.0)
    total = tl.zeros([BM, BN], ACC)
    for start in range(0, K, BN):
        column = start + tl.arange(0, BN)
        dy = _tile(grad, row, P, column, K, K % BN == 0).to(ACC)
        total += dy * _tile(y, row, P, column, K, K % BN == 0).to(ACC)
        _store_tile(g, row, P, column, K, dy * scale[:, None])
    tl.store(c + row, tl.sum(total, 1) * scale * scale / C, mask=row < P)


@triton.jit
def _backward_x(
    g, weight, x, c, dx, P,
    C: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dx [P, C] = g W - c x."""
    row, column = _place(C, BM, BN)
    acc = tl.zeros([BM, BN], ACC)
    for start in range(0, K, BK):
        out = start + tl.arange(0, BK)
        a = _tile(g, row, P, out, K, K % BK == 0)
        b = _tile(weight, out, K, column, C, C % BN == 0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=ACC)
    along = tl.load(c + row, mask=row < P, other=0.0)[:, None] * _tile(x, row, P, column, C, C % BN == 0).to(ACC)
    _store_tile(dx, row, P, column, C, acc - along)


@triton.jit
def _backward_weight(
    g, x, dw, P,
    C: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dW [K, C] = g^T x."""
    out, column = _place(C, BM, BN)
    acc = tl.zeros([BM, BN], ACC)
    for start in range(0, P, BK):
        row = start + tl.arange(0, BK)
        a = _tile(g, row, P, out, K, K % BM == 0)
        b = _tile(x, row, P, column, C, C % BN == 0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee", out_dtype=ACC)
    _store_tile(dw, out, K, column, C, acc)


# --- host ---


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launches the forward pass. Returns y [P, K] and rstd [P]."""
    x, weight, shape = x.contiguous(), weight.contiguous(), _shape(x, weight)
    (rows, columns), outs = x.shape, weight.shape[0]
    y, rstd = x.new_empty(rows, outs), x.new_empty(rows, dtype=torch.promote_types(x.dtype, torch.float32))
    tiles = config(OP, "rows", x.dtype, columns)
    _rstd[(triton.cdiv(rows, tiles["BM"]),)](x, rstd, rows, EPS=eps, C=columns, ACC=shape["ACC"], enable_fp_fusion=True, **tiles)
    tiles = config(OP, "forward", x.dtype, columns)
    _forward[_grid(rows, outs, tiles)](x, weight, y, rstd, rows, **shape, **tiles)
    return y, rstd


def backward(grad: Tensor, x: Tensor, weight: Tensor, y: Tensor, rstd: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    """Launches the backward pass. Returns dx [P, C] and dW [K, C], [0] in place of one that is not needed."""
    grad, x, weight, shape = grad.contiguous(), x.contiguous(), weight.contiguous(), _shape(x, weight)
    (rows, columns), outs = x.shape, weight.shape[0]
    g, c = torch.empty_like(grad), torch.empty_like(rstd)
    tiles = config(OP, "rows", x.dtype, outs)
    _backward_rows[(triton.cdiv(rows, tiles["BM"]),)](grad, y, rstd, g, c, rows, **shape, **tiles)
    dx, dw = x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)
    if need_x:
        tiles = config(OP, "backward_x", x.dtype, columns)
        _backward_x[_grid(rows, columns, tiles)](g, weight, x, c, dx, rows, **shape, **tiles)
    if need_weight:
        tiles = config(OP, "backward_weight", x.dtype, columns)
        _backward_weight[_grid(outs, columns, tiles)](g, x, dw, rows, **shape, **tiles)
    return dx, dw


def _shape(x: Tensor, weight: Tensor) -> dict[str, object]:
    wide = {torch.float32: tl.float32, torch.float64: tl.float64}[torch.promote_types(x.dtype, torch.float32)]
    return {"C": x.shape[1], "K": weight.shape[0], "ACC": wide, "enable_fp_fusion": True}


def _grid(rows: int, columns: int, tiles: Config) -> tuple[int]:
    return (triton.cdiv(rows, tiles["BM"]) * triton.cdiv(columns, tiles["BN"]),)


# --- the op ---


@torch.library.custom_op("idefics2_fast::perceiver_context", mutates_args=())
def _op(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return forward(x, weight, eps)


@_op.register_fake
def _(x, weight, eps):
    rows = x.shape[0]
    return x.new_empty(rows, weight.shape[0]), x.new_empty(rows, dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("idefics2_fast::perceiver_context_backward", mutates_args=())
def _backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, y: Tensor, rstd: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return backward(grad, x, weight, y, rstd, need_x, need_weight)


@_backward_op.register_fake
def _(grad, x, weight, y, rstd, need_x, need_weight):
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _keep(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad: Tensor, _: None) -> tuple[Tensor | None, Tensor | None, None]:
    need_x, need_weight, _ = ctx.needs_input_grad
    dx, dw = _backward_op(grad, *ctx.saved_tensors, need_x, need_weight)
    return dx if need_x else None, dw if need_weight else None, None


_op.register_autograd(_differentiate, setup_context=_keep)


def project(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The op by Triton, differentiable once in x and weight. Shapes as in `perceiver_context.folded`.

    Args:
        x, weight: fp32, bf16 or fp16, both the same.

    Raises:
        ValueError: their dtypes differ.
    """
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and the weight {weight.dtype}: expected one dtype")
    return _op(x, weight, eps)[0] if x.shape[0] else x @ weight.T  # nothing to launch, yet both get gradients: of zeros
