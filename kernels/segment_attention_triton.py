"""Attention within segments on a GPU: formula and legend in `segment_attention.py`.

One launch serves segments of all lengths, empty ones too. Its grid follows from the number of rows and of segments alone: cut into blocks
of B rows, segment s has the places from offsets[s] // B + s on, which are as many as it has blocks, or one more that ends at once. Queries,
keys and values are read where they are, as views of one product with any stride of rows. A head dim is two pieces, each a power of two.

Backward: delta = out . grad of every row; one pass with the keys in place over their rows gives dK and dV, one with the rows in place over
their keys gives dQ. There are no atomics, so the same inputs give the same bits.

Scores are in base 2: lse = log2(sum_j exp(scale * q . k_j)), [N, T].
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_fast.kernels.attention_tiles import add_dot, columns, dot, pieces, store_columns, triton_dtype, whole
from idefics2_fast.kernels.segments import Segments
from idefics2_fast.kernels.tuned import config

OP = "segment_attention"
LOWEST = tl.constexpr(-1e30)  # below every score, and finite: a row that has not met a key yet is as if it had met one of weight 0


# --- device ---


@triton.jit
def _place(offsets, segments, B: tl.constexpr):
    """The segment of this program's block of B rows: where it begins, its length, and where in it the block begins."""
    passed = 0
    for start in range(0, segments, 128):
        segment = start + tl.arange(0, 128)
        begin = tl.load(offsets + segment, mask=segment < segments, other=0x7FFFFFFF)
        passed += tl.sum((begin // B + segment <= tl.program_id(0)).to(tl.int32), 0)
    begin = tl.load(offsets + passed - 1)
    return begin.to(tl.int64), tl.load(offsets + passed) - begin, (tl.program_id(0) - begin // B - (passed - 1)) * B


@triton.jit
def _keys(block, length, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The keys that a block of rows sees: the first, where those end that come in whole blocks which all rows see, and the end of all."""
    first, ragged, last = 0, length // BN * BN, length
    if CAUSAL:
        ragged, last = block // BN * BN, tl.minimum(block + BM, length)
        if WINDOW:
            first = tl.maximum(block - WINDOW + 1, 0)
            ragged = first
    return first, ragged, last


@triton.jit
def _sees(row, key, length, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which rows see which keys; `row` and `key` are broadcast against each other."""
    seen = key < length
    if CAUSAL:
        seen = seen & (key <= row)
        if WINDOW:
            seen = seen & (key > row - WINDOW)
    return seen


@triton.jit
def _attend(
    q1, q2, k, v, row, start, length, top, total, o1, o2, SCALE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    H: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    ACC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Adds a block of keys to a running softmax: maximum, sum of weights, weighted sum of values."""
    key = start + tl.arange(0, BN)
    inside = key >= 0
    if MASKED:
        inside = key < length
    k1, k2 = columns(k, key, inside, K_STRIDE, H, 0, D1), columns(k, key, inside, K_STRIDE, H, D1, D2)
    score = add_dot(q2, tl.trans(k2), dot(q1, tl.trans(k1), ACC), ACC)
    if MASKED:
        score = tl.where(_sees(row[:, None], key[None, :], length, CAUSAL, WINDOW), score, -float("inf"))
    higher = tl.maximum(top, tl.max(score, 1) * SCALE)
    weight = tl.exp2(score * SCALE - higher[:, None])
    rescale = tl.exp2(top - higher)
    total = total * rescale + tl.sum(weight, 1)
    v1, v2 = columns(v, key, inside, V_STRIDE, H, 0, D1), columns(v, key, inside, V_STRIDE, H, D1, D2)
    weight = weight.to(v1.dtype)
    o1 = add_dot(weight, v1, o1 * rescale[:, None], ACC)
    o2 = add_dot(weight, v2, o2 * rescale[:, None], ACC)
    return higher, total, o1, o2


@triton.jit(do_not_specialize=["T", "segments"])
def _forward(
    q, k, v, offsets, out, lse, T, segments,
    SCALE: tl.constexpr, Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
    H: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [T, N, H] and lse [N, T]: a block of a segment's rows against its keys."""
    begin, length, block = _place(offsets, segments, BM)
    if block >= length:
        return
    head = tl.program_id(1).to(tl.int64)
    row = block + tl.arange(0, BM)
    valid = row < length
    q += begin * Q_STRIDE + head * H
    k += begin * K_STRIDE + (head // G) * H
    v += begin * V_STRIDE + (head // G) * H
    q1, q2 = columns(q, row, valid, Q_STRIDE, H, 0, D1), columns(q, row, valid, Q_STRIDE, H, D1, D2)
    top, total = tl.full([BM], LOWEST, ACC), tl.zeros([BM], ACC)
    o1, o2 = tl.zeros([BM, D1], ACC), tl.zeros([BM, D2], ACC)
    first, ragged, last = _keys(block, length, CAUSAL, WINDOW, BM, BN)
    for start in range(first, ragged, BN):
        top, total, o1, o2 = _attend(
            q1, q2, k, v, row, start, length, top, total, o1, o2, SCALE, K_STRIDE, V_STRIDE, H, D1, D2, False, CAUSAL, WINDOW, ACC, BN
        )
    for start in range(ragged, last, BN):
        top, total, o1, o2 = _attend(
            q1, q2, k, v, row, start, length, top, total, o1, o2, SCALE, K_STRIDE, V_STRIDE, H, D1, D2, True, CAUSAL, WINDOW, ACC, BN
        )
    out += begin * (N * H) + head * H
    inverse = (1.0 / total)[:, None]
    store_columns(out, row, valid, o1 * inverse, N * H, H, 0, D1)
    store_columns(out, row, valid, o2 * inverse, N * H, H, D1, D2)
    tl.store(lse + head * T + begin + row, top + tl.log2(total), mask=valid)


@triton.jit(do_not_specialize=["T"])
def _deltas(out, grad, delta, T, N: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr):
    """delta [N, T]: out . grad."""
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    valid = row < T
    product = columns(out + head * H, row, valid, N * H, H, 0, WIDTH).to(ACC)
    product *= columns(grad + head * H, row, valid, N * H, H, 0, WIDTH).to(ACC)
    tl.store(delta + head * T + row, tl.sum(product, 1), mask=valid)


@triton.jit
def _gather_dq(
    q1, q2, g1, g2, lse, delta, k, v, row, start, length, d1, d2, SCALE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    H: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    ACC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Adds a block of keys to sum_j p_j (grad . v_j - delta) k_j."""
    key = start + tl.arange(0, BN)
    inside = key >= 0
    if MASKED:
        inside = key < length
    k1, k2 = columns(k, key, inside, K_STRIDE, H, 0, D1), columns(k, key, inside, K_STRIDE, H, D1, D2)
    v1, v2 = columns(v, key, inside, V_STRIDE, H, 0, D1), columns(v, key, inside, V_STRIDE, H, D1, D2)
    score = add_dot(q2, tl.trans(k2), dot(q1, tl.trans(k1), ACC), ACC)
    p = tl.exp2(score * SCALE - lse[:, None])
    if MASKED:
        p = tl.where(_sees(row[:, None], key[None, :], length, CAUSAL, WINDOW), p, 0.0)
    dp = add_dot(g2, tl.trans(v2), dot(g1, tl.trans(v1), ACC), ACC)
    ds = (p * (dp - delta[:, None])).to(k1.dtype)
    return add_dot(ds, k1, d1, ACC), add_dot(ds, k2, d2, ACC)


@triton.jit(do_not_specialize=["T", "segments"])
def _backward_q(
    q, k, v, offsets, grad, lse, delta, dq, T, segments,
    SCALE: tl.constexpr, LN2: tl.constexpr, Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dQ [T, N, H]: a block of a segment's rows against its keys."""
    begin, length, block = _place(offsets, segments, BM)
    if block >= length:
        return
    head = tl.program_id(1).to(tl.int64)
    row = block + tl.arange(0, BM)
    valid = row < length
    q += begin * Q_STRIDE + head * H
    k += begin * K_STRIDE + (head // G) * H
    v += begin * V_STRIDE + (head // G) * H
    grad += begin * (N * H) + head * H
    q1, q2 = columns(q, row, valid, Q_STRIDE, H, 0, D1), columns(q, row, valid, Q_STRIDE, H, D1, D2)
    g1, g2 = columns(grad, row, valid, N * H, H, 0, D1), columns(grad, row, valid, N * H, H, D1, D2)
    at = head * T + begin + row
    lse, delta = tl.load(lse + at, mask=valid, other=0.0), tl.load(delta + at, mask=valid, other=0.0)
    d1, d2 = tl.zeros([BM, D1], ACC), tl.zeros([BM, D2], ACC)
    first, ragged, last = _keys(block, length, CAUSAL, WINDOW, BM, BN)
    for start in range(first, ragged, BN):
        d1, d2 = _gather_dq(
            q1, q2, g1, g2, lse, delta, k, v, row, start, length, d1, d2,
            SCALE, K_STRIDE, V_STRIDE, H, D1, D2, False, CAUSAL, WINDOW, ACC, BN,
        )  # fmt: skip
    for start in range(ragged, last, BN):
        d1, d2 = _gather_dq(
            q1, q2, g1, g2, lse, delta, k, v, row, start, length, d1, d2,
            SCALE, K_STRIDE, V_STRIDE, H, D1, D2, True, CAUSAL, WINDOW, ACC, BN,
        )  # fmt: skip
    dq += begin * (N * H) + head * H
    store_columns(dq, row, valid, d1 * (SCALE * LN2), N * H, H, 0, D1)
    store_columns(dq, row, valid, d2 * (SCALE * LN2), N * H, H, D1, D2)


@triton.jit(do_not_specialize=["T", "segments"])
def _backward_kv(
    q, k, v, offsets, grad, lse, delta, dk, dv, T, segments,
    SCALE: tl.constexpr, LN2: tl.constexpr, Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dK and dV [T, M, H]: a block of a segment's keys against the rows, of each query head in turn, that see them.

    A row beyond the segment is zero, its gradient too, and adds nothing.
    """
    begin, length, block = _place(offsets, segments, BN)
    if block >= length:
        return
    M: tl.constexpr = N // G
    kv_head = tl.program_id(1).to(tl.int64)
    key = block + tl.arange(0, BN)
    inside = key < length
    k += begin * K_STRIDE + kv_head * H
    v += begin * V_STRIDE + kv_head * H
    k1, k2 = columns(k, key, inside, K_STRIDE, H, 0, D1), columns(k, key, inside, K_STRIDE, H, D1, D2)
    v1, v2 = columns(v, key, inside, V_STRIDE, H, 0, D1), columns(v, key, inside, V_STRIDE, H, D1, D2)
    dk1, dk2 = tl.zeros([BN, D1], ACC), tl.zeros([BN, D2], ACC)
    dv1, dv2 = tl.zeros([BN, D1], ACC), tl.zeros([BN, D2], ACC)
    first, last = 0, length
    if CAUSAL:
        first = block // BM * BM
        if WINDOW:
            last = tl.minimum(block + BN + WINDOW - 1, length)
    for member in range(G):
        head = kv_head * G + member
        q_head, grad_head = q + begin * Q_STRIDE + head * H, grad + begin * (N * H) + head * H
        at = head * T + begin
        for start in range(first, last, BM):
            row = start + tl.arange(0, BM)
            valid = row < length
            q1, q2 = columns(q_head, row, valid, Q_STRIDE, H, 0, D1), columns(q_head, row, valid, Q_STRIDE, H, D1, D2)
            g1, g2 = columns(grad_head, row, valid, N * H, H, 0, D1), columns(grad_head, row, valid, N * H, H, D1, D2)
            lse_block = tl.load(lse + at + row, mask=valid, other=0.0)
            delta_block = tl.load(delta + at + row, mask=valid, other=0.0)
            score = add_dot(k2, tl.trans(q2), dot(k1, tl.trans(q1), ACC), ACC)
            p = tl.exp2(score * SCALE - lse_block[None, :])
            if CAUSAL:
                p = tl.where(_sees(row[None, :], key[:, None], length, CAUSAL, WINDOW), p, 0.0)
            weight = p.to(g1.dtype)
            dv1 = add_dot(weight, g1, dv1, ACC)
            dv2 = add_dot(weight, g2, dv2, ACC)
            dp = add_dot(v2, tl.trans(g2), dot(v1, tl.trans(g1), ACC), ACC)
            ds = (p * (dp - delta_block[None, :])).to(q1.dtype)
            dk1 = add_dot(ds, q1, dk1, ACC)
            dk2 = add_dot(ds, q2, dk2, ACC)
    dk += begin * (M * H) + kv_head * H
    dv += begin * (M * H) + kv_head * H
    store_columns(dk, key, inside, dk1 * (SCALE * LN2), M * H, H, 0, D1)
    store_columns(dk, key, inside, dk2 * (SCALE * LN2), M * H, H, D1, D2)
    store_columns(dv, key, inside, dv1, M * H, H, 0, D1)
    store_columns(dv, key, inside, dv2, M * H, H, D1, D2)


# --- host ---


def forward(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """Launches the forward pass. Returns out [T, N, H] and lse [N, T]."""
    (rows, heads, dim), segments = q.shape, offsets.shape[0] - 1
    q, k, v = (_by_rows(x) for x in (q, k, v))
    out = q.new_empty(q.shape)
    lse = q.new_empty(heads, rows, dtype=torch.promote_types(q.dtype, torch.float32))
    if not rows:
        return out, lse
    tiles = config(OP, "forward", q.dtype, dim)
    _forward[(_blocks(rows, segments, tiles["BM"]), heads)](
        q, k, v, offsets, out, lse, rows, segments, **_shape(q, k, v), **pieces(dim), **_rule(causal, window, scale), **tiles
    )
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, out: Tensor, lse: Tensor, causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the backward pass: gradients of q, k, v, each dense."""
    (rows, heads, dim), segments = q.shape, offsets.shape[0] - 1
    grad, q, k, v = grad.contiguous(), *(_by_rows(x) for x in (q, k, v))
    delta, dq, dk, dv = torch.empty_like(lse), *(x.new_empty(x.shape) for x in (q, k, v))
    if not rows:
        return dq, dk, dv
    shape = _shape(q, k, v)
    tiles = config(OP, "rows", q.dtype, dim)
    row = {name: shape[name] for name in ("N", "H", "ACC", "enable_fp_fusion")}
    _deltas[(triton.cdiv(rows, tiles["BM"]), heads)](out, grad, delta, rows, **row, **whole(dim), **tiles)

    common = {**shape, **pieces(dim), **_rule(causal, window, scale), "LN2": math.log(2)}
    tiles = config(OP, "backward_kv", q.dtype, 128 if causal else dim)  # the mask needs registers, so smaller tiles
    _backward_kv[(_blocks(rows, segments, tiles["BN"]), k.shape[1])](
        q, k, v, offsets, grad, lse, delta, dk, dv, rows, segments, **common, **tiles
    )
    tiles = config(OP, "backward_q", q.dtype, dim)
    _backward_q[(_blocks(rows, segments, tiles["BM"]), heads)](q, k, v, offsets, grad, lse, delta, dq, rows, segments, **common, **tiles)
    return dq, dk, dv


def _by_rows(x: Tensor) -> Tensor:
    """Rows [T, N, H] that are dense, a stride apart, as views of one product are; else a copy that is."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _blocks(rows: int, segments: int, block: int) -> int:
    """Places for the blocks of any segments of so many rows."""
    return rows // block + segments


def _shape(q: Tensor, k: Tensor, v: Tensor) -> dict[str, object]:
    wide = torch.promote_types(q.dtype, torch.float32)
    strides = {"Q_STRIDE": q.stride(0), "K_STRIDE": k.stride(0), "V_STRIDE": v.stride(0)}
    return {**strides, "N": q.shape[1], "G": q.shape[1] // k.shape[1], "H": q.shape[2], "ACC": triton_dtype(wide), "enable_fp_fusion": True}


def _rule(causal: bool, window: int, scale: float) -> dict[str, object]:
    return {"CAUSAL": causal, "WINDOW": window, "SCALE": scale / math.log(2)}


# --- the op ---


@torch.library.custom_op("idefics2_fast::segment_attention", mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool, window: int, scale: float) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, offsets, causal, window, scale)


@_op.register_fake
def _(q, k, v, offsets, causal, window, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("idefics2_fast::segment_attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, out: Tensor, lse: Tensor, causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(grad, q, k, v, offsets, out, lse, causal, window, scale)


@_backward_op.register_fake
def _(grad, q, k, v, offsets, out, lse, causal, window, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.causal, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *_backward_op(grad, *ctx.saved_tensors, ctx.causal, ctx.window, ctx.scale), None, None, None, None


_op.register_autograd(_differentiate, setup_context=_keep)


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, window: int | None, scale: float) -> Tensor:
    """The op by Triton, differentiable once in its three tensors. Shapes as in `segment_attention.sdpa`.

    Args:
        q: fp32, bf16 or fp16, H a multiple of 8 up to 128. Rows may be strided, as views of one product are; heads must not be, or a copy
            is made.

    Raises:
        ValueError: another head dim, a scale that is not positive, a window that is not causal or sees nothing, segments of other rows, or
            a segment whose elements 32 bits do not count.
    """
    if q.shape[2] % 8 or not 0 < q.shape[2] <= 128:
        raise ValueError(f"head dim {q.shape[2]}: expected a multiple of 8 up to 128")
    if not scale > 0:
        raise ValueError(f"scale {scale}: expected a positive number")
    if window is not None and not (causal and window > 0):
        raise ValueError(f"window {window}, causal={causal}: expected one of 1 or more, of causal attention")
    if segments.total != q.shape[0]:
        raise ValueError(f"segments of {segments.total} rows for {q.shape[0]} queries: expected as many")
    if segments.longest * max(x.stride(0) for x in (q, k, v)) >= 2**31:
        raise ValueError(f"a segment of {segments.longest} rows: expected fewer than 2^31 elements from its first to its last")
    return _op(q, k, v, segments.offsets, causal, window or 0, scale)[0]
