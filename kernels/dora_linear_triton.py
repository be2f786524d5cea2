"""DoRA's linear layer on a GPU: formula and legend in `dora_linear.py`.

Norm: one pass over W for sum(B . U), U = W A^T, by tensor cores; A in fp32 becomes the sum of two matrices in bf16, whose products with W
in bf16 are exact. What is left to do has the size of B.

Forward: two products into one accumulator, x W^T and h (s B)^T, which is scaled by g and shifted by b in fp32 and rounded once. W is never
copied. Backward, from the output:

    z = g * dy,   dx = z W + dh A,   dh = z (s B),   dB = s z^T h,   dA = dh^T x,   dm = sum(dy * (y - b)) / m

one pass for z and dm, two products into one accumulator for dx. Where g is small y does not tell what it was made from: those columns' dm
are computed anew. Sums over rows are made in parts, which are added in their order: the same inputs give the same bits.

A product by Triton is slower than the library's, which takes a pass over its result for the second product and another one for g: `fuses`
says which of them it is. The products of width r that have no companion are the library's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from idefics2_fast.kernels.dora_linear import CANCELLED, SMALLEST_GAIN, _scale
from idefics2_fast.kernels.perceiver_context_triton import _place, _store_tile, _tile
from idefics2_fast.kernels.tuned import MULTIPROCESSORS, Config, config

OP = "dora_linear"
# Matrices in bf16 whose sum stands for A. What is left out of its numbers, 2^-17 of each, has no common sign: it changes a norm by 1e-7.
TERMS = 2
# Multiply-adds for each number of a product in the time of a pass over it: 800 TFLOP/s / 2 * 4 bytes / 3.0 TB/s.
PASS = 533
# What a product by Triton reaches of the library's rate: 540 of 800 TFLOP/s by the model of the pipes, not measured.
RATE = 0.67
# Programs: with fewer of them multiprocessors are idle, and the library takes smaller tiles.
FULL = MULTIPROCESSORS
# With a bias, a gain below this: y, rounded to half precision, says too little of what was added to the bias.
SMALLEST_GAIN_BIASED = 0.25


# --- device: norms ---


@triton.jit
def _square(weight, square, OUT, C: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """||W||^2 of the rows [OUT]."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    squares = tl.zeros([BM, BN], ACC)
    for start in range(0, C, BN):
        w = _tile(weight, row, OUT, start + tl.arange(0, BN), C, C % BN == 0).to(ACC)
        squares += w * w
    tl.store(square + row, tl.sum(squares, 1), mask=row < OUT)


@triton.jit
def _cross(
    weight, terms, b, part, OUT,
    C: tl.constexpr, RANK: tl.constexpr, COUNT: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """sum(B . U) over the columns of part `program 1` and BN ranks: part [RANK / BN, parts, OUT]. A is the sum of the terms."""
    row, rank = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(2) * BN + tl.arange(0, BN)
    each = tl.cdiv(tl.cdiv(C, BK), tl.num_programs(1)) * BK
    first = tl.program_id(1) * each
    acc = tl.zeros([BM, BN], ACC)
    for start in range(first, tl.minimum(first + each, C), BK):
        column = start + tl.arange(0, BK)
        w = _tile(weight, row, OUT, column, C, C % BK == 0)
        for term in tl.static_range(COUNT):
            a = _tile(terms + term * RANK * C, rank, RANK, column, C, C % BK == 0)
            acc = tl.dot(w, tl.trans(a), acc, input_precision="ieee", out_dtype=ACC)
    own = _tile(b, row, OUT, rank, RANK, RANK % BN == 0)
    place = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    tl.store(part + place * OUT + row, tl.sum(acc * own, 1), mask=row < OUT)


@triton.jit
def _from_b(
    b, row, rows, other, start,
    RANK: tl.constexpr, N: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM rows of B times BN columns of `other` [RANK, N] from column `start` on."""
    acc = tl.zeros([BM, BN], ACC)
    for first in range(0, RANK, BK):
        rank = first + tl.arange(0, BK)
        left = _tile(b, row, rows, rank, RANK, RANK % BK == 0)
        right = _tile(other, rank, RANK, start + tl.arange(0, BN), N, N % BN == 0)
        acc = tl.dot(left, right, acc, input_precision="ieee", out_dtype=ACC)
    return acc


@triton.jit
def _norm(
    weight, a, b, gram, part, square, norm, OUT, parts,
    C: tl.constexpr, RANK: tl.constexpr, SCALING: tl.constexpr, CANCELLED: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """n [OUT]: the parts of sum(B . U) added, sum((B G) . B), the root; rows that nearly cancel from W + s B A itself."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    cross = tl.zeros([BM], ACC)
    for index in range(parts):
        cross += tl.load(part + index * OUT + row, mask=row < OUT, other=0.0)
    quadratic = tl.zeros([BM, BN], ACC)
    for start in range(0, RANK, BN):
        own = _tile(b, row, OUT, start + tl.arange(0, BN), RANK, RANK % BN == 0)
        quadratic += own * _from_b(b, row, OUT, gram, start, RANK, RANK, ACC, BM, BN, BK)
    whole = tl.load(square + row, mask=row < OUT, other=0.0)
    squared = whole + SCALING * (2 * cross + SCALING * tl.sum(quadratic, 1))
    cancelled = squared < CANCELLED * whole
    if tl.sum(cancelled.to(tl.int32), 0) > 0:
        direct = tl.zeros([BM, BN], ACC)
        for start in range(0, C, BN):
            w = _tile(weight, row, OUT, start + tl.arange(0, BN), C, C % BN == 0).to(ACC)
            w += SCALING * _from_b(b, row, OUT, a, start, RANK, C, ACC, BM, BN, BK)
            direct += w * w
        squared = tl.where(cancelled, tl.sum(direct, 1), squared)
    root = tl.sqrt(squared) if ACC == tl.float64 else tl.sqrt_rn(squared)
    tl.store(norm + row, root, mask=row < OUT)


# --- device: the layer ---


@triton.jit
def _forward(
    x, weight, h, b, gain, bias, y, T,
    C: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y [T, K] of x [T, C] and h [T, RANK]; b is s B [K, RANK]."""
    row, out = _place(K, BM, BN)
    acc = tl.zeros([BM, BN], ACC)
    for start in range(0, C, BK):
        column = start + tl.arange(0, BK)
        left = _tile(x, row, T, column, C, C % BK == 0)
        right = _tile(weight, out, K, column, C, C % BK == 0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee", out_dtype=ACC)
    for start in range(0, RANK, BR):
        rank = start + tl.arange(0, BR)
        left = _tile(h, row, T, rank, RANK, RANK % BR == 0)
        right = _tile(b, out, K, rank, RANK, RANK % BR == 0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee", out_dtype=ACC)
    if gain is not None:
        acc *= tl.load(gain + out, mask=out < K, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + out, mask=out < K, other=0.0).to(ACC)[None, :]
    _store_tile(y, row, T, out, K, acc)


@triton.jit
def _backward_gain(
    grad, y, gain, bias, z, part, T,
    K: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """z [T, K], and sum(dy * (y - b)) over ROWS rows each: part [T / ROWS, K]."""
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    g = tl.load(gain + column, mask=column < K, other=0.0)[None, :]
    shift = tl.zeros([1, BN], ACC)
    if bias is not None:
        shift += tl.load(bias + column, mask=column < K, other=0.0).to(ACC)[None, :]
    total = tl.zeros([BM, BN], ACC)
    for start in range(0, ROWS, BM):
        row = tl.program_id(0) * ROWS + start + tl.arange(0, BM)
        dy = _tile(grad, row, T, column, K, K % BN == 0).to(ACC)
        total += dy * (_tile(y, row, T, column, K, K % BN == 0).to(ACC) - shift)
        _store_tile(z, row, T, column, K, dy * g)
    tl.store(part + tl.program_id(0) * K + column, tl.sum(total, 0), mask=column < K)


@triton.jit
def _backward_lost(
    grad, x, weight, h, b, gain, sums, T,
    C: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr, SMALLEST: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """sum(dy * (W x + s B h)) of column `program 0` in `sums` [K], if its g is small."""
    out = tl.program_id(0)
    if tl.abs(tl.load(gain + out)) <= SMALLEST:
        total = tl.zeros([BM, BN], ACC)
        for first in range(0, T, BM):
            row = first + tl.arange(0, BM)
            dy = tl.load(grad + row.to(tl.int64) * K + out, mask=row < T, other=0.0).to(ACC)[:, None]
            for start in range(0, C, BN):
                column = start + tl.arange(0, BN)
                w = tl.load(weight + out.to(tl.int64) * C + column, mask=column < C, other=0.0).to(ACC)
                total += dy * _tile(x, row, T, column, C, C % BN == 0).to(ACC) * w[None, :]
            for start in range(0, RANK, BN):
                rank = start + tl.arange(0, BN)
                own = tl.load(b + out.to(tl.int64) * RANK + rank, mask=rank < RANK, other=0.0).to(ACC)
                total += dy * _tile(h, row, T, rank, RANK, RANK % BN == 0).to(ACC) * own[None, :]
        tl.store(sums + out, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def _backward_x(
    z, weight, dh, a, dx, T,
    C: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dx [T, C] = z W + dh A."""
    row, column = _place(C, BM, BN)
    acc = tl.zeros([BM, BN], ACC)
    for start in range(0, K, BK):
        out = start + tl.arange(0, BK)
        left = _tile(z, row, T, out, K, K % BK == 0)
        right = _tile(weight, out, K, column, C, C % BN == 0)
        acc = tl.dot(left, right, acc, input_precision="ieee", out_dtype=ACC)
    for start in range(0, RANK, BR):
        rank = start + tl.arange(0, BR)
        left = _tile(dh, row, T, rank, RANK, RANK % BR == 0)
        right = _tile(a, rank, RANK, column, C, C % BN == 0)
        acc = tl.dot(left, right, acc, input_precision="ieee", out_dtype=ACC)
    _store_tile(dx, row, T, column, C, acc)


@triton.jit
def _outer(
    p, q, part, T,
    M: tl.constexpr, N: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """p^T q of p [T, M] and q [T, N], over the rows of part `program 1` each: part [parts, M, N]."""
    m, n = _place(N, BM, BN)
    each = tl.cdiv(tl.cdiv(T, BK), tl.num_programs(1)) * BK
    first = tl.program_id(1) * each
    last = tl.minimum(first + each, T)
    acc = tl.zeros([BM, BN], ACC)
    for start in range(first, last, BK):
        row = start + tl.arange(0, BK)
        left = _tile(p, row, last, m, M, M % BM == 0)
        right = _tile(q, row, last, n, N, N % BN == 0)
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee", out_dtype=ACC)
    _store_tile(part + tl.program_id(1).to(tl.int64) * M * N, m, M, n, N, acc)


# --- host: norms ---


def row_square(weight: Tensor) -> Tensor:
    """`dora_linear.row_square` by Triton."""
    return _square_op(weight.detach())


def row_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float, square: Tensor | None = None) -> Tensor:
    """`dora_linear.row_norm` by Triton, W in bf16 or fp32. Reads W once, and once more where `square` is not given."""
    square = row_square(weight) if square is None else square
    return _norm_op(weight.detach(), a.detach(), b.detach(), scaling, square.detach())


@torch.library.custom_op("idefics2_fast::dora_square_triton", mutates_args=())
def _square_op(weight: Tensor) -> Tensor:
    weight, (out, width) = weight.contiguous(), weight.shape
    square = weight.new_empty(out, dtype=_wide(weight))
    tiles = config(OP, "square", weight.dtype, width)
    _square[(triton.cdiv(out, tiles["BM"]),)](weight, square, out, C=width, **_kind(weight), **tiles)
    return square


@torch.library.custom_op("idefics2_fast::dora_norm_triton", mutates_args=())
def _norm_op(weight: Tensor, a: Tensor, b: Tensor, scaling: float, square: Tensor) -> Tensor:
    weight, (out, width), (rank, _) = weight.contiguous(), weight.shape, a.shape
    a, b = (t.to(_wide(weight)).contiguous() for t in (a, b))
    part, turned, norm = cross(weight, a, b), a.T.contiguous(), torch.empty_like(square)
    tiles = config(OP, "norm", weight.dtype, width)
    _norm[(triton.cdiv(out, tiles["BM"]),)](
        weight, a, b, outer(turned, turned), part, square, norm, out, part.shape[0],
        C=width, RANK=rank, SCALING=scaling, CANCELLED=CANCELLED, **_kind(weight), **tiles,
    )  # fmt: skip
    return norm


@_square_op.register_fake
def _(weight):
    return weight.new_empty(weight.shape[0], dtype=_wide(weight))


@_norm_op.register_fake
def _(weight, a, b, scaling, square):
    return torch.empty_like(square)


def cross(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum(B . (W A^T)) of the rows, in parts [parts, out] that add up to it."""
    (out, width), rank = weight.shape, a.shape[0]
    tiles = config(OP, "cross", weight.dtype, rank)
    blocks, chunks = triton.cdiv(out, tiles["BM"]), triton.cdiv(rank, tiles["BN"])
    parts = _parts(blocks * chunks, width, tiles["BK"])
    terms = _terms(a, weight.dtype)
    part = a.new_empty(chunks * parts, out)
    _cross[blocks, parts, chunks](weight, terms, b, part, out, C=width, RANK=rank, COUNT=terms.shape[0], **_kind(weight), **tiles)
    return part


def _terms(a: Tensor, dtype: torch.dtype) -> Tensor:
    """A as a sum of matrices of this dtype, the largest first: [TERMS, r, in], or [1, r, in] where it is A's own."""
    terms: list[Tensor] = []
    for _ in range(1 if a.dtype == dtype else TERMS):
        terms.append((a - sum(term.to(a.dtype) for term in terms)).to(dtype) if terms else a.to(dtype))
    return torch.stack(terms)


# --- host: the layer ---


def fuses(programs: int, width: int, passes: int) -> bool:
    """Whether Triton makes a product along `width`, with what the library takes `passes` over it for: if predicted to be no slower."""
    return programs >= FULL and width <= RATE * (width + passes * PASS)


def forward(x: Tensor, h: Tensor, weight: Tensor, b: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """y [..., out] of x [..., in] and h [..., r]; b is s B in their dtype."""
    rows, width, out = x.shape[:-1].numel(), x.shape[-1], weight.shape[0]
    tiles = config(OP, "forward", x.dtype, width)
    (programs,) = _grid(rows, out, tiles)
    if not fuses(programs, width, passes=1 if gain is None else 2):
        y = F.linear(x, weight, bias if gain is None else None)
        y.flatten(0, -2).addmm_(h.flatten(0, -2), b.T)
        return y if gain is None else _scale(y, gain, bias, out=y)
    y = x.new_empty(*x.shape[:-1], out)
    _forward[(programs,)](x, weight, h, b, gain, bias, y, rows, C=width, K=out, RANK=b.shape[1], BR=_ranks(b.shape[1]), **_kind(x), **tiles)
    return y


def backward_x(z: Tensor, weight: Tensor, dh: Tensor, a: Tensor | None) -> Tensor:
    """dx [T, in] = z W + dh A; without A the first alone."""
    (rows, out), width, tiles = z.shape, weight.shape[1], config(OP, "backward_x", z.dtype, weight.shape[1])
    (programs,) = _grid(rows, width, tiles)
    if a is None or not fuses(programs, out, passes=1):
        dx = torch.mm(z, weight)
        return dx if a is None else dx.addmm_(dh, a)
    dx, rank = z.new_empty(rows, width), a.shape[0]
    _backward_x[(programs,)](z, weight, dh, a, dx, rows, C=width, K=out, RANK=rank, BR=_ranks(rank), **_kind(z), **tiles)
    return dx


def backward_gain(
    grad: Tensor, y: Tensor, x: Tensor, h: Tensor, weight: Tensor, b: Tensor, gain: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """z [T, out], and the gain's gradient [out]."""
    (rows, out), width = grad.shape, weight.shape[1]
    tiles = config(OP, "backward_gain", grad.dtype, out)
    z, blocks = torch.empty_like(grad), triton.cdiv(rows, tiles["ROWS"])
    part = gain.new_empty(blocks, out)
    _backward_gain[blocks, triton.cdiv(out, tiles["BN"])](grad, y, gain, bias, z, part, rows, K=out, **_kind(x), **tiles)
    sums, smallest = part.sum(0) / gain, SMALLEST_GAIN if bias is None else SMALLEST_GAIN_BIASED
    _backward_lost[(out,)](
        grad, x, weight, h, b, gain, sums, rows,
        C=width, K=out, RANK=b.shape[1], SMALLEST=smallest, **_kind(x), **config(OP, "backward_lost", x.dtype, width),
    )  # fmt: skip
    return z, sums


def outer(p: Tensor, q: Tensor) -> Tensor:
    """p^T q of p [T, M] and q [T, N] -> [M, N], at least in fp32. Rows are summed in parts, and these in their order."""
    p, q, rows, m, n = p.contiguous(), q.contiguous(), p.shape[0], p.shape[1], q.shape[1]
    tiles = config(OP, "outer", p.dtype, n)
    (blocks,) = _grid(m, n, tiles)
    parts = _parts(blocks, rows, tiles["BK"])
    part = p.new_empty(parts, m, n, dtype=_wide(p))
    _outer[blocks, parts](p, q, part, rows, M=m, N=n, **_kind(p), **tiles)
    return part.sum(0)


def _parts(blocks: int, length: int, step: int) -> int:
    """Parts of a sum over `length`, none of them empty, so that with `blocks` results each the multiprocessors are busy once."""
    steps = triton.cdiv(length, step)
    each = triton.cdiv(steps, max(1, MULTIPROCESSORS // blocks))
    return max(1, triton.cdiv(steps, max(1, each)))


def _ranks(rank: int) -> int:
    """Ranks that are multiplied at a time; those beyond `rank` are zeros."""
    return min(64, max(16, triton.next_power_of_2(rank)))


def _grid(rows: int, columns: int, tiles: Config) -> tuple[int]:
    return (triton.cdiv(rows, tiles["BM"]) * triton.cdiv(columns, tiles["BN"]),)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _kind(x: Tensor) -> dict[str, object]:
    return {"ACC": tl.float64 if x.dtype == torch.float64 else tl.float32, "enable_fp_fusion": True}


# --- the op ---


@torch.library.custom_op("idefics2_fast::dora_linear_triton", mutates_args=())
def _op(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor,
    magnitude: Tensor | None,
    norm: Tensor | None,
    bias: Tensor | None,
    scaling: float,
) -> Tensor:
    """y [..., out] of x [..., in] and h [..., r]. A, if given, is what h was made with: the gradient then goes to x and A, and not to h."""
    x, h, weight = (t.contiguous() for t in (x, h, weight))
    return forward(x, h, weight, _scaled(b, scaling, x), _gain(magnitude, norm, x), None if bias is None else bias.contiguous())


@_op.register_fake
def _(x, h, weight, a, b, magnitude, norm, bias, scaling):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("idefics2_fast::dora_linear_triton_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor,
    magnitude: Tensor | None,
    norm: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of those of x, h, W, A, B, m and b that need one, in this order."""
    (grad, x_rows, h_rows), weight, own = _rows(grad, x, h), weight.contiguous(), _scaled(b, scaling, x)
    z, gain, gradients = grad, _gain(magnitude, norm, x), {}
    if gain is not None:
        z, of_gain = backward_gain(grad, *_rows(y), x_rows, h_rows, weight, own, gain, bias)
    dh = z @ own
    need_x, need_h, need_weight, need_a, need_b, need_magnitude, need_bias = needs
    if need_x:
        gradients["x"] = backward_x(z, weight, dh, None if a is None else a.to(x.dtype).contiguous()).view(x.shape)
    if need_h:
        gradients["h"] = dh.view(h.shape)
    if need_weight:
        gradients["weight"] = z.T @ x_rows
    if need_a:
        gradients["a"] = outer(x_rows, dh).T.to(a.dtype).contiguous()
    if need_b:
        gradients["b"] = outer(z, h_rows).mul_(scaling).to(b.dtype)
    if need_magnitude:
        gradients["magnitude"] = (of_gain / norm).to(magnitude.dtype)
    if need_bias:
        gradients["bias"] = grad.sum(0, dtype=_wide(grad)).to(bias.dtype)
    return list(gradients.values())


@_backward_op.register_fake
def _(grad, y, x, h, weight, a, b, magnitude, norm, bias, scaling, needs):
    inputs = (x, h, weight, a, b, magnitude, bias)
    return [t.new_empty(t.shape) for t, need in zip(inputs, needs, strict=True) if need]


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(None if tensors[5] is None else output, *tensors)  # the output is for m, the sixth


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad)  # x, h, W, A, B, m, n, b, s: those but n and s can
    made = iter(_backward_op(grad, *ctx.saved_tensors, ctx.scaling, needs[:6] + needs[7:8]))
    return tuple(next(made) if need else None for need in needs)


_op.register_autograd(_differentiate, setup_context=_keep)


def _rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As matrices, row after row in memory."""
    return tuple(t.flatten(0, -2).contiguous() for t in tensors)


def _scaled(b: Tensor, scaling: float, x: Tensor) -> Tensor:
    """s B in the dtype of x, rounded once."""
    return (b.to(_wide(x)) * scaling).to(x.dtype).contiguous()


def _gain(magnitude: Tensor | None, norm: Tensor | None, x: Tensor) -> Tensor | None:
    return None if magnitude is None else (magnitude / norm).to(_wide(x))


def project(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scaling: float,
    dropped: Tensor | None = None,
    base_sees_dropout: bool = False,
    norm: Tensor | None = None,
) -> Tensor:
    """`dora_linear.factored` by Triton, differentiable once in all tensors but `norm`.

    Args:
        x, weight: fp32, bf16 or fp64, both the same.

    Raises:
        ValueError: their dtypes differ.
    """
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and the weight {weight.dtype}: expected one dtype")
    if magnitude is not None and norm is None:
        norm = row_norm(weight, a, b, scaling)
    if magnitude is not None and base_sees_dropout and dropped is not None:
        change = project(dropped, weight, a, b, magnitude, scaling=scaling, norm=norm) - F.linear(dropped, weight)
        return F.linear(x, weight, bias) + change
    if dropped is not None:
        return _op(x, F.linear(dropped, a.to(x.dtype)), weight, None, b, magnitude, norm, bias, scaling)
    with torch.no_grad():
        h = F.linear(x.contiguous(), a.to(x.dtype).contiguous())
    return _op(x, h, weight, a, b, magnitude, norm, bias, scaling)


def folded(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    b: Tensor,
    magnitude: Tensor | None = None,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scaling: float,
    rows: Sequence[int],
) -> Tensor:
    """`dora_linear.folded` by Triton: projections whose h are made together, by one product with all their A."""
    own = b if len(rows) < 2 else torch.block_diag(*b.split(list(rows)))
    return _op(x, h, weight, None, own, magnitude, norm, bias, scaling)
