"""Perceiver pooling attention on a GPU: formula and legend in `perceiver_attention.py`.

The G = N / M query heads of a KV head and the L latents of an image are packed into R = G * L rows, row = latent * G + head in its group,
so that keys and values are read once. They come in two loops, over the image's context and over its own latents, never concatenated. The
context is split among programs where images are few; splits are combined in their order. A head dim is two pieces, each a power of two.

Backward: one pass with the keys in place over the packed rows gives dK and dV, one with the rows in place gives dQ of every split. There
are no atomics, so the same inputs give the same bits. Grids follow from shapes and from `longest`, which is a hint: a context longer than
that is still covered, by programs that take more than one block. What is loaded inside a loop is tiles alone: the rows' lse and delta are
read once, since a vector of a block's rows is too short for loads of 16 bytes.

Scores are in base 2: lse = log2(sum_j exp(scale * q . k_j)), [I, M, R].
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_fast.kernels.attention_tiles import add_dot, columns, dot, pieces, store_columns, triton_dtype, whole
from idefics2_fast.kernels.segments import Segments
from idefics2_fast.kernels.tuned import MULTIPROCESSORS, config

OP = "perceiver_attention"
# Keys below which splitting a context costs more than it gains: a split writes its R rows in fp32.
KEYS_PER_SPLIT = 256


# --- device ---


@triton.jit
def _packed(row, HEADS: tl.constexpr, G: tl.constexpr, H: tl.constexpr):
    """Where packed rows begin in [L, N, H], counted from the first row of their KV head."""
    return (row // G) * (HEADS * H) + (row % G) * H


@triton.jit
def _split_range(length, split, splits, BN: tl.constexpr):
    """The keys of a split: whole blocks, the last splits empty where there are too few."""
    each = tl.cdiv(tl.cdiv(length, BN), splits) * BN
    first = tl.minimum(split * each, length)
    return first, tl.minimum(first + each, length)


@triton.jit
def _attend(
    q1, q2, k, v, first, last, top, total, o1, o2, SCALE: tl.constexpr, STRIDE: tl.constexpr, H: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds keys `first` to `last` to a running softmax: maximum, sum of weights, weighted sum of values."""
    for start in range(first, last, BN):
        key = start + tl.arange(0, BN)
        inside = key < last
        k1 = columns(k, key, inside, STRIDE, H, 0, D1)
        k2 = columns(k, key, inside, STRIDE, H, D1, D2)
        score = add_dot(q2, tl.trans(k2), dot(q1, tl.trans(k1), ACC), ACC)
        score = tl.where(inside[None, :], score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1) * SCALE)
        weight = tl.exp2(score * SCALE - higher[:, None])
        rescale = tl.exp2(top - higher)
        total = total * rescale + tl.sum(weight, 1)
        v1 = columns(v, key, inside, STRIDE, H, 0, D1)
        v2 = columns(v, key, inside, STRIDE, H, D1, D2)
        weight = weight.to(v1.dtype)
        o1 = add_dot(weight, v1, o1 * rescale[:, None], ACC)
        o2 = add_dot(weight, v2, o2 * rescale[:, None], ACC)
        top = higher
    return top, total, o1, o2


@triton.jit
def _forward(
    q, k_context, v_context, k_latents, v_latents, offsets, part, part_lse, splits,
    SCALE: tl.constexpr, L: tl.constexpr, G: tl.constexpr, M: tl.constexpr, H: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    CONTEXT_STRIDE: tl.constexpr, LATENT_STRIDE: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One block of packed rows against one split of their image's keys, which for the first split includes the latents' own.

    part [I, M, splits, R, H]: outputs, zero of an empty split; part_lse [I, M, splits, R]: -inf of an empty one.
    """
    R: tl.constexpr = G * L
    BLOCKS: tl.constexpr = (R + BM - 1) // BM
    split, head, image = tl.program_id(0) // BLOCKS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) % BLOCKS) * BM + tl.arange(0, BM)
    valid = row < R
    q += (image * L * M + head) * (G * H)
    q1 = columns(q, _packed(row, M * G, G, H), valid, 1, H, 0, D1)
    q2 = columns(q, _packed(row, M * G, G, H), valid, 1, H, D1, D2)
    top = tl.full([BM], -float("inf"), ACC)
    total = tl.zeros([BM], ACC)
    o1, o2 = tl.zeros([BM, D1], ACC), tl.zeros([BM, D2], ACC)

    begin = tl.load(offsets + image)
    first, last = _split_range(tl.load(offsets + image + 1) - begin, split, splits, BN)
    at = begin.to(tl.int64) * CONTEXT_STRIDE + head * H
    top, total, o1, o2 = _attend(
        q1, q2, k_context + at, v_context + at, first, last, top, total, o1, o2, SCALE, CONTEXT_STRIDE, H, D1, D2, BN, ACC
    )
    if split == 0:
        at = image * L * LATENT_STRIDE + head * H
        top, total, o1, o2 = _attend(
            q1, q2, k_latents + at, v_latents + at, 0, L, top, total, o1, o2, SCALE, LATENT_STRIDE, H, D1, D2, BN, ACC
        )
    at = ((image * M + head) * splits + split) * R
    inverse = (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    store_columns(part + at * H, row, valid, o1 * inverse, H, H, 0, D1)
    store_columns(part + at * H, row, valid, o2 * inverse, H, H, D1, D2)
    tl.store(part_lse + at + row, top + tl.log2(total), mask=valid)


@triton.jit
def _combine(
    part, part_lse, out, lse, splits,
    L: tl.constexpr, G: tl.constexpr, M: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Outputs [I * L, N, H] and lse [I, M, R] from those of the splits, in the splits' order."""
    R: tl.constexpr = G * L
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = row < R
    at = (image * M + head) * splits * R
    top = tl.full([BM], -float("inf"), ACC)
    for split in range(splits):
        top = tl.maximum(top, tl.load(part_lse + at + split * R + row, mask=valid, other=0.0))
    total, o = tl.zeros([BM], ACC), tl.zeros([BM, WIDTH], ACC)
    for split in range(splits):
        weight = tl.exp2(tl.load(part_lse + at + split * R + row, mask=valid, other=0.0) - top)
        total += weight
        o += weight[:, None] * columns(part + (at + split * R) * H, row, valid, H, H, 0, WIDTH)
    out += (image * L * M + head) * (G * H)
    store_columns(out, _packed(row, M * G, G, H), valid, o / total[:, None], 1, H, 0, WIDTH)
    tl.store(lse + (image * M + head) * R + row, top + tl.log2(total), mask=valid)


@triton.jit
def _deltas(
    out, grad, delta,
    L: tl.constexpr, G: tl.constexpr, M: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """delta [I, M, R]: out . grad of every packed row."""
    R: tl.constexpr = G * L
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = row < R
    at = (image * L * M + head) * (G * H)
    where = _packed(row, M * G, G, H)
    product = columns(out + at, where, valid, 1, H, 0, WIDTH).to(ACC) * columns(grad + at, where, valid, 1, H, 0, WIDTH).to(ACC)
    tl.store(delta + (image * M + head) * R + row, tl.sum(product, 1), mask=valid)


@triton.jit
def _gather_dq(
    q1, q2, g1, g2, lse, delta, k, v, first, last, d1, d2, SCALE: tl.constexpr, STRIDE: tl.constexpr, H: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds keys `first` to `last` to sum_j p_j (grad . v_j - delta) k_j."""
    for start in range(first, last, BN):
        key = start + tl.arange(0, BN)
        inside = key < last
        k1 = columns(k, key, inside, STRIDE, H, 0, D1)
        k2 = columns(k, key, inside, STRIDE, H, D1, D2)
        v1 = columns(v, key, inside, STRIDE, H, 0, D1)
        v2 = columns(v, key, inside, STRIDE, H, D1, D2)
        score = add_dot(q2, tl.trans(k2), dot(q1, tl.trans(k1), ACC), ACC)
        p = tl.where(inside[None, :], tl.exp2(score * SCALE - lse[:, None]), 0.0)
        dp = add_dot(g2, tl.trans(v2), dot(g1, tl.trans(v1), ACC), ACC)
        ds = (p * (dp - delta[:, None])).to(k1.dtype)
        d1 = add_dot(ds, k1, d1, ACC)
        d2 = add_dot(ds, k2, d2, ACC)
    return d1, d2


@triton.jit
def _backward_q(
    q, k_context, v_context, k_latents, v_latents, offsets, grad, lse, delta, part, splits,
    SCALE: tl.constexpr, LN2: tl.constexpr, L: tl.constexpr, G: tl.constexpr, M: tl.constexpr, H: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, CONTEXT_STRIDE: tl.constexpr, LATENT_STRIDE: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """part [I, M, splits, R, H]: what each split of the keys adds to dQ."""
    R: tl.constexpr = G * L
    BLOCKS: tl.constexpr = (R + BM - 1) // BM
    split, head, image = tl.program_id(0) // BLOCKS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) % BLOCKS) * BM + tl.arange(0, BM)
    valid = row < R
    at = (image * L * M + head) * (G * H)
    where = _packed(row, M * G, G, H)
    q1, q2 = columns(q + at, where, valid, 1, H, 0, D1), columns(q + at, where, valid, 1, H, D1, D2)
    g1, g2 = columns(grad + at, where, valid, 1, H, 0, D1), columns(grad + at, where, valid, 1, H, D1, D2)
    at = (image * M + head) * R + row
    lse, delta = tl.load(lse + at, mask=valid, other=0.0), tl.load(delta + at, mask=valid, other=0.0)
    d1, d2 = tl.zeros([BM, D1], ACC), tl.zeros([BM, D2], ACC)

    begin = tl.load(offsets + image)
    first, last = _split_range(tl.load(offsets + image + 1) - begin, split, splits, BN)
    at = begin.to(tl.int64) * CONTEXT_STRIDE + head * H
    d1, d2 = _gather_dq(
        q1, q2, g1, g2, lse, delta, k_context + at, v_context + at, first, last, d1, d2, SCALE, CONTEXT_STRIDE, H, D1, D2, BN, ACC
    )
    if split == 0:
        at = image * L * LATENT_STRIDE + head * H
        d1, d2 = _gather_dq(
            q1, q2, g1, g2, lse, delta, k_latents + at, v_latents + at, 0, L, d1, d2, SCALE, LATENT_STRIDE, H, D1, D2, BN, ACC
        )
    part += (((image * M + head) * splits + split) * R) * H
    store_columns(part, row, valid, d1 * (SCALE * LN2), H, H, 0, D1)
    store_columns(part, row, valid, d2 * (SCALE * LN2), H, H, D1, D2)


@triton.jit
def _sum_splits(
    part, dq, splits,
    L: tl.constexpr, G: tl.constexpr, M: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """dQ [I * L, N, H] from the splits' parts, added in their order."""
    R: tl.constexpr = G * L
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = row < R
    part += (image * M + head) * splits * R * H
    total = tl.zeros([BM, WIDTH], ACC)
    for split in range(splits):
        total += columns(part + split * R * H, row, valid, H, H, 0, WIDTH)
    dq += (image * L * M + head) * (G * H)
    store_columns(dq, _packed(row, M * G, G, H), valid, total, 1, H, 0, WIDTH)


@triton.jit
def _backward_kv(
    q, k, v, offsets, grad, lse, delta, dk, dv,
    SCALE: tl.constexpr, LN2: tl.constexpr, L: tl.constexpr, G: tl.constexpr, M: tl.constexpr, H: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, STRIDE: tl.constexpr, OWN: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dK and dV, [keys, M, H], of an image's context, or (OWN) of its latents' own keys: every num_programs(0)-th block of them."""
    R: tl.constexpr = G * L
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    at = (image * L * M + head) * (G * H)
    q += at
    grad += at
    BLOCKS: tl.constexpr = triton.next_power_of_2((R + BM - 1) // BM)
    number = tl.arange(0, BLOCKS)[:, None]
    at = number * BM + tl.arange(0, BM)[None, :]
    lses = tl.load(lse + (image * M + head) * R + at, mask=at < R, other=0.0)
    deltas = tl.load(delta + (image * M + head) * R + at, mask=at < R, other=0.0)
    if OWN:
        begin, keys = image * L, L
    else:
        begin = tl.load(offsets + image)
        keys = tl.load(offsets + image + 1) - begin
        begin = begin.to(tl.int64)
    k += begin * STRIDE + head * H
    v += begin * STRIDE + head * H
    dk += (begin * M + head) * H
    dv += (begin * M + head) * H
    for start in range(tl.program_id(0) * BN, keys, tl.num_programs(0) * BN):
        key = start + tl.arange(0, BN)
        inside = key < keys
        k1, k2 = columns(k, key, inside, STRIDE, H, 0, D1), columns(k, key, inside, STRIDE, H, D1, D2)
        v1, v2 = columns(v, key, inside, STRIDE, H, 0, D1), columns(v, key, inside, STRIDE, H, D1, D2)
        dk1, dk2 = tl.zeros([BN, D1], ACC), tl.zeros([BN, D2], ACC)
        dv1, dv2 = tl.zeros([BN, D1], ACC), tl.zeros([BN, D2], ACC)
        for block in range(0, R, BM):
            row = block + tl.arange(0, BM)
            valid = row < R
            where = _packed(row, M * G, G, H)
            q1, q2 = columns(q, where, valid, 1, H, 0, D1), columns(q, where, valid, 1, H, D1, D2)
            g1, g2 = columns(grad, where, valid, 1, H, 0, D1), columns(grad, where, valid, 1, H, D1, D2)
            lse_block = tl.sum(tl.where(number == block // BM, lses, 0.0), 0)
            delta_block = tl.sum(tl.where(number == block // BM, deltas, 0.0), 0)
            score = add_dot(k2, tl.trans(q2), dot(k1, tl.trans(q1), ACC), ACC)
            p = tl.exp2(score * SCALE - lse_block[None, :])
            weight = p.to(g1.dtype)
            dv1 = add_dot(weight, g1, dv1, ACC)
            dv2 = add_dot(weight, g2, dv2, ACC)
            dp = add_dot(v2, tl.trans(g2), dot(v1, tl.trans(g1), ACC), ACC)
            ds = (p * (dp - delta_block[None, :])).to(q1.dtype)
            dk1 = add_dot(ds, q1, dk1, ACC)
            dk2 = add_dot(ds, q2, dk2, ACC)
        store_columns(dk, key, inside, dk1 * (SCALE * LN2), M * H, H, 0, D1)
        store_columns(dk, key, inside, dk2 * (SCALE * LN2), M * H, H, D1, D2)
        store_columns(dv, key, inside, dv1, M * H, H, 0, D1)
        store_columns(dv, key, inside, dv2, M * H, H, D1, D2)


# --- host ---


def forward(
    q: Tensor, k_context: Tensor, v_context: Tensor, k_latents: Tensor, v_latents: Tensor, offsets: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Launches the forward pass. Returns out [I * L, N, H] and lse [I, M, R]."""
    shape, images, kv_heads, rows = _shape(q, k_context, offsets)
    q, (k_context, v_context), (k_latents, v_latents) = q.contiguous(), _alike(k_context, v_context), _alike(k_latents, v_latents)
    tiles = config(OP, "forward", q.dtype, shape["H"])
    programs = images * kv_heads * triton.cdiv(rows, tiles["BM"])
    splits = _splits(programs, longest)
    wide = torch.promote_types(q.dtype, torch.float32)
    part = q.new_empty(images, kv_heads, splits, rows, shape["H"], dtype=wide)
    part_lse = q.new_empty(images, kv_heads, splits, rows, dtype=wide)
    _forward[(triton.cdiv(rows, tiles["BM"]) * splits, kv_heads, images)](
        q, k_context, v_context, k_latents, v_latents, offsets, part, part_lse, splits,
        SCALE=scale / math.log(2), **shape, **pieces(shape["H"]), CONTEXT_STRIDE=k_context.stride(0), LATENT_STRIDE=k_latents.stride(0),
        ACC=triton_dtype(wide), **tiles, enable_fp_fusion=True,
    )  # fmt: skip
    out, lse = torch.empty_like(q), q.new_empty(images, kv_heads, rows, dtype=wide)
    tiles = config(OP, "rows", q.dtype, shape["H"])
    _combine[(triton.cdiv(rows, tiles["BM"]), kv_heads, images)](
        part, part_lse, out, lse, splits, **shape, **whole(shape["H"]), ACC=triton_dtype(wide), **tiles, enable_fp_fusion=True
    )
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k_context: Tensor, v_context: Tensor, k_latents: Tensor, v_latents: Tensor, offsets: Tensor,
    out: Tensor, lse: Tensor, longest: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the backward pass: gradients of q, k_context, v_context, k_latents, v_latents, each dense."""
    shape, images, kv_heads, rows = _shape(q, k_context, offsets)
    q, grad, context, latents = q.contiguous(), grad.contiguous(), _alike(k_context, v_context), _alike(k_latents, v_latents)
    delta = torch.empty_like(lse)
    common = {**shape, "ACC": triton_dtype(lse.dtype), "enable_fp_fusion": True}
    tiles = config(OP, "rows", q.dtype, shape["H"])
    row_grid = (triton.cdiv(rows, tiles["BM"]), kv_heads, images)
    _deltas[row_grid](out, grad, delta, **common, **whole(shape["H"]), **tiles)

    scales = {"SCALE": scale / math.log(2), "LN2": math.log(2)}
    gradients = []
    for keys_values, length, own in ((context, longest, False), (latents, shape["L"], True)):
        made = [x.new_empty(x.shape) for x in keys_values]
        block = config(OP, "backward_kv", q.dtype, shape["H"])
        _backward_kv[(max(1, triton.cdiv(length, block["BN"])), kv_heads, images)](
            q, *keys_values, offsets, grad, lse, delta, *made,
            **scales, **common, **pieces(shape["H"]), STRIDE=keys_values[0].stride(0), OWN=own, **block,
        )  # fmt: skip
        gradients += made

    block = config(OP, "backward_q", q.dtype, shape["H"])
    splits = _splits(images * kv_heads * triton.cdiv(rows, block["BM"]), longest)
    part = lse.new_empty(images, kv_heads, splits, rows, shape["H"])
    _backward_q[(triton.cdiv(rows, block["BM"]) * splits, kv_heads, images)](
        q, *context, *latents, offsets, grad, lse, delta, part, splits,
        **scales, **common, **pieces(shape["H"]), CONTEXT_STRIDE=context[0].stride(0), LATENT_STRIDE=latents[0].stride(0), **block,
    )  # fmt: skip
    dq = torch.empty_like(q)
    _sum_splits[row_grid](part, dq, splits, **common, **whole(shape["H"]), **tiles)
    return dq, *gradients


def _shape(q: Tensor, k_context: Tensor, offsets: Tensor) -> tuple[dict[str, int], int, int, int]:
    """The kernels' constants L, G, M, H, and I, M, R."""
    images, (heads, dim), kv_heads = offsets.shape[0] - 1, q.shape[1:], k_context.shape[1]
    shape = {"L": q.shape[0] // images, "G": heads // kv_heads, "M": kv_heads, "H": dim}
    return shape, images, kv_heads, shape["G"] * shape["L"]


def _splits(programs: int, longest: int) -> int:
    """Parts of a context, for two programs on each multiprocessor, none of them with few keys."""
    return max(1, min(triton.cdiv(2 * MULTIPROCESSORS, programs), longest // KEYS_PER_SPLIT))


def _alike(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [rows, M, H] whose rows have one stride and are dense, as views of one product are; else copies that are."""
    dense = all(x.stride()[1:] == (x.shape[2], 1) for x in (k, v)) and k.stride(0) == v.stride(0)
    return (k, v) if dense else (k.contiguous(), v.contiguous())


# --- the op ---


@torch.library.custom_op("idefics2_fast::perceiver_attention", mutates_args=())
def _op(
    q: Tensor, k_context: Tensor, v_context: Tensor, k_latents: Tensor, v_latents: Tensor, offsets: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    return forward(q, k_context, v_context, k_latents, v_latents, offsets, longest, scale)


@_op.register_fake
def _(q, k_context, v_context, k_latents, v_latents, offsets, longest, scale):
    images, kv_heads = offsets.shape[0] - 1, k_context.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = q.shape[0] // images * (q.shape[1] // kv_heads)
    return q.new_empty(q.shape), q.new_empty(images, kv_heads, rows, dtype=wide)


@torch.library.custom_op("idefics2_fast::perceiver_attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor, q: Tensor, k_context: Tensor, v_context: Tensor, k_latents: Tensor, v_latents: Tensor, offsets: Tensor,
    out: Tensor, lse: Tensor, longest: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(grad, q, k_context, v_context, k_latents, v_latents, offsets, out, lse, longest, scale)


@_backward_op.register_fake
def _(grad, q, k_context, v_context, k_latents, v_latents, offsets, out, lse, longest, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k_context, v_context, k_latents, v_latents))


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.longest, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *_backward_op(grad, *ctx.saved_tensors, ctx.longest, ctx.scale), None, None, None


_op.register_autograd(_differentiate, setup_context=_keep)


def attend(
    q: Tensor, k_context: Tensor, v_context: Tensor, k_latents: Tensor, v_latents: Tensor, images: Segments, *, scale: float
) -> Tensor:
    """The op by Triton, differentiable once in its five tensors. Shapes as in `perceiver_attention.sdpa`.

    Args:
        q: fp32, bf16 or fp16, H a multiple of 8 up to 128. Keys and values as views of one product are read where they are.

    Raises:
        ValueError: another head dim, or a scale that is not positive.
    """
    if q.shape[2] % 8 or not 0 < q.shape[2] <= 128:
        raise ValueError(f"head dim {q.shape[2]}: expected a multiple of 8 up to 128")
    if not scale > 0:
        raise ValueError(f"scale {scale}: expected a positive number")
    if not len(images):
        return q + sum(x.sum() for x in (k_context, v_context, k_latents, v_latents))  # no rows, yet all get gradients: of zeros
    return _op(q, k_context, v_context, k_latents, v_latents, images.offsets, images.longest, scale)[0]
