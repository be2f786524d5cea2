"""A linear layer under DoRA, arXiv 2402.09353, without the matrix that DoRA speaks of.

    y = g * (W x + s B h) + b,   h = A x,   g = m / n,   n = ||W + s B A|| of every row

W is [out, in], A [r, in], B [out, r], the magnitude m [out]. n is a constant in the backward pass, s belongs to it, and b is not scaled.
LoRA is the case without m, where g = 1. Dropout is on the adapter's branch alone: h = A dropout(x). PEFT 0.21 has another rule,
`base_sees_dropout`, in which what DoRA adds to the frozen layer sees dropout as a whole:

    y = W x + b + (g - 1) * W dropout(x) + g * s B A dropout(x)

W + s B A is never formed. Its rows' norms come from products of width r,

    n^2 = ||W||^2 + 2 s sum(B . U) + s^2 sum((B G) . B),   U = W A^T,   G = A A^T

in fp32, which cost one pass over W and lose their digits in rows where s B A nearly cancels W: those are computed directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of W that are widened, or computed directly, at a time: 256 x 4096 fp32 is 4 MiB.
BLOCK = 256
# A row whose squared norm is below this part of ||W||^2 is computed directly: 1e-3 of it holds rounding errors of 1e-7 / 1e-3 in fp32.
CANCELLED = 1e-3
# A gain below this, and the output says too little of what it was made from.
SMALLEST_GAIN = 1e-3


def reference(
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
) -> Tensor:
    """The formula in the inputs' dtype: x [..., in] -> [..., out].

    Args:
        weight, a, b, magnitude, bias: W [out, in], A [r, in], B [out, r], m [out] (none for LoRA), b [out].
        scaling: s, alpha / r.
        dropped: dropout(x), where there is dropout.
        base_sees_dropout: PEFT's rule.
    """
    dropped = x if dropped is None else dropped
    gain = 1.0 if magnitude is None else magnitude / torch.linalg.vector_norm((weight + scaling * b @ a).detach(), dim=1)
    base, delta = x @ weight.T, scaling * (dropped @ a.T) @ b.T
    y = base + (gain - 1) * (dropped @ weight.T) + gain * delta if base_sees_dropout else gain * (base + delta)
    return y if bias is None else y + bias


def factored(
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
    """The same by products of width r, differentiable once in all tensors but `norm`, which is `row_norm`'s where it is known already."""
    dropped = x if dropped is None else dropped
    h, base = F.linear(dropped, a), F.linear(x, weight, bias)
    if magnitude is None:
        return combine(base, h, b, scaling=scaling)
    norm = row_norm(weight, a, b, scaling) if norm is None else norm
    if not base_sees_dropout:
        return combine(base, h, b, magnitude, norm, bias, scaling=scaling)
    seen = F.linear(dropped, weight)
    return base - seen + combine(seen, h, b, magnitude, norm, scaling=scaling)


def combine(
    base: Tensor,
    h: Tensor,
    b: Tensor,
    magnitude: Tensor | None = None,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scaling: float,
) -> Tensor:
    """Adds an adapter to the output of a frozen layer: g * (base - bias + s B h) + bias.

    One tensor of the output's size is kept for the backward pass, on a CPU the output itself as a rule. Double backward raises a
    RuntimeError.

    Args:
        base: W x + b [..., out].
        h: A x [..., r].
        b: B [out, r].
        magnitude, norm: m and n [out]; none for LoRA.
        bias: b [out], which is part of `base`.
        scaling: s.

    Returns:
        [..., out] in the wider dtype of `base` and `h`.
    """
    dtype = torch.promote_types(base.dtype, h.dtype)
    base, h, b = base.to(dtype), h.to(dtype), b.to(dtype)
    with torch.autocast(base.device.type, enabled=False):
        if magnitude is None:
            return torch.add(base, F.linear(h, b), alpha=scaling)
        bias = None if bias is None else bias.to(dtype)
        if torch.is_grad_enabled():
            return _Combine.apply(base, h, b, magnitude, norm, bias, scaling)
        inner = _inner(base, h, b, bias, scaling)
        return _scale(inner, magnitude / norm, bias, out=inner)


class _Combine(torch.autograd.Function):
    """Returns no view: FSDP2 and others hang hooks on what a layer returns, which are lost when a view is written to."""

    @staticmethod
    def forward(ctx, base: Tensor, h: Tensor, b: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
        inner, gain = _inner(base, h, b, bias, scaling), magnitude / norm
        ctx.scaling, ctx.keeps_output = scaling, _is_invertible(gain)
        output = _scale(inner, gain, bias, out=inner if ctx.keeps_output else torch.empty_like(inner))
        ctx.save_for_backward(output if ctx.keeps_output else inner, h, b, magnitude, norm, bias if ctx.keeps_output else None)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, h, b, magnitude, norm, bias = ctx.saved_tensors
        _, needs_h, needs_b, needs_magnitude, _, needs_bias, _ = ctx.needs_input_grad
        gain, rows = magnitude / norm, grad.flatten(0, -2)
        with torch.autocast(grad.device.type, enabled=False):
            grad_inner, products = _scale_and_dot(rows, gain, kept.flatten(0, -2), bias)
            products = products / gain if ctx.keeps_output else products
            return (
                grad_inner.view(kept.shape),
                (grad_inner @ b).mul_(ctx.scaling).view(h.shape) if needs_h else None,
                (grad_inner.T @ h.flatten(0, -2)).mul_(ctx.scaling) if needs_b else None,
                (products / norm).to(magnitude.dtype) if needs_magnitude else None,
                None,
                ((1 - gain) * rows.sum(0, dtype=gain.dtype)).to(grad.dtype) if needs_bias else None,
                None,
            )


def folds(x: Tensor, weight: Tensor) -> bool:
    """Whether `folded` is for these rows: in training on a CPU, and, with as many rows as W has columns, W is no larger than the output."""
    plain = x.is_cpu and x.dtype == weight.dtype == torch.float32 and not torch.compiler.is_compiling()
    return plain and torch.is_grad_enabled() and x.shape[0] >= weight.shape[1]


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
    """g * (W x + s B h) + b of a frozen W, with g multiplied into W and B, and not into what they give.

    No pass over the output is left but the one that the magnitude's gradient takes. Matrices with g are made anew in each pass.

    Args:
        x, h: [T, in] and A x [T, projections * r], fp32, as all others.
        weight, b, magnitude, norm, bias: W [out, in], B [out, r], m, n (none of both for LoRA) and b [out]; W and b get no gradient.
        scaling: s.
        rows: of W, which belong to each of one or more projections: they have an h of their own, one beside the other.

    Returns:
        [T, out], which is kept for the backward pass. Double backward raises a RuntimeError.
    """
    if magnitude is not None and not _is_invertible(magnitude / norm):
        diagonal = torch.block_diag(*b.split(list(rows)))
        return combine(F.linear(x, weight, bias), h, diagonal, magnitude, norm, bias, scaling=scaling)
    return _Folded.apply(x, h, weight, b, magnitude, norm, bias, scaling, tuple(rows))


class _Folded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        h: Tensor,
        weight: Tensor,
        b: Tensor,
        magnitude: Tensor | None,
        norm: Tensor | None,
        bias: Tensor | None,
        scaling: float,
        rows: tuple[int, ...],
    ) -> Tensor:
        assert not weight.requires_grad
        ctx.scaling, ctx.rows = scaling, rows
        output = F.linear(x, _gained(weight, magnitude, norm), bias)
        own = _gained(b, magnitude, norm, scaling).split(rows)
        for y, h_own, b_own in zip(output.split(rows, 1), h.chunk(len(rows), 1), own, strict=True):
            y.addmm_(h_own, b_own.T)
        ctx.save_for_backward(None if magnitude is None else output, h, weight, b, magnitude, norm, bias)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, h, weight, b, magnitude, norm, bias = ctx.saved_tensors
        needs_x, needs_h, _, needs_b, needs_magnitude, *_ = ctx.needs_input_grad
        own, scaled = grad.split(ctx.rows, 1), _gained(b, magnitude, norm, ctx.scaling).split(ctx.rows)
        grad_b = [g.T @ h_own for g, h_own in zip(own, h.chunk(len(ctx.rows), 1), strict=True)] if needs_b else None
        return (
            grad @ _gained(weight, magnitude, norm) if needs_x else None,
            torch.cat([g @ b_own for g, b_own in zip(own, scaled, strict=True)], 1) if needs_h else None,
            None,
            _gained(torch.cat(grad_b), magnitude, norm, ctx.scaling) if needs_b else None,
            _dot(grad, output, bias) / magnitude if needs_magnitude else None,
            None,
            None,
            None,
            None,
        )


def _gained(matrix: Tensor, magnitude: Tensor | None, norm: Tensor | None, scaling: float = 1.0) -> Tensor:
    """s * g times the rows of a matrix [out, ...]; g is 1 without a magnitude."""
    if magnitude is not None:
        return matrix * (magnitude / norm).mul_(scaling)[:, None]
    return matrix if scaling == 1.0 else matrix * scaling


def _dot(grad: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """The columns' sums of grad * (values - bias), by blocks of rows that stay in cache."""
    sums = grad.new_zeros(grad.shape[1])
    for rows, block in zip(grad.split(BLOCK), values.split(BLOCK), strict=True):
        sums += (rows * block if bias is None else (block - bias).mul_(rows)).sum(0)
    return sums


def _inner(base: Tensor, h: Tensor, b: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """W x + s B h in new memory."""
    inner = base.new_empty(base.shape)
    inner = inner.copy_(base) if bias is None else torch.sub(base, bias, out=inner)
    inner.flatten(0, -2).addmm_(h.flatten(0, -2), b.T, alpha=scaling)
    return inner


def _scale(inner: Tensor, gain: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """g * inner + b, rounded once to the dtype of `out`."""
    return torch.mul(inner, gain, out=out) if bias is None else torch.addcmul(bias, inner, gain, out=out)


def _is_invertible(gain: Tensor) -> bool:
    """Whether W x + s B h can be had back from the output, which what follows a layer mostly keeps anyway.

    Not where a row's magnitude has gone to zero; nor on a GPU, which would have to wait for the answer, or in compiled code.
    """
    if gain.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool((gain.abs() > SMALLEST_GAIN).all())


def _scale_and_dot(grad: Tensor, gain: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """g * grad, and the columns' sums of grad * (values - bias) in the gain's dtype, by blocks of rows that stay in cache."""
    if torch.compiler.is_compiling():
        return (grad * gain).to(grad.dtype), (grad * values.to(gain.dtype)).sum(0)  # fused
    scaled, sums = torch.empty_like(values), torch.zeros_like(gain)
    for rows, out, block in zip(grad.split(BLOCK), scaled.split(BLOCK), values.split(BLOCK), strict=True):
        torch.mul(rows, gain, out=out)
        block = block.to(gain.dtype) if bias is None else block.to(gain.dtype) - bias
        sums += block.mul(rows).sum(0)
    return scaled, sums


def row_square(weight: Tensor) -> Tensor:
    """||W||^2 of the rows of [out, in], in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        return torch.cat([torch.linalg.vector_norm(block, dim=1).square_() for block in _blocks(weight, wide)])


def row_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float, square: Tensor | None = None) -> Tensor:
    """n = ||W + s B A|| of the rows, [out] in fp32 (fp64 for fp64), without gradient.

    Args:
        weight, a, b: W [out, in], A [r, in], B [out, r] in any floating dtypes.
        scaling: s.
        square: `row_square(weight)`, where it is known already.
    """
    with torch.no_grad():
        return _row_norm(weight.detach(), a.detach(), b.detach(), scaling, square)


@torch.library.custom_op("idefics2_fast::dora_row_norm", mutates_args=())
def _compiled_row_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float, square: Tensor | None) -> Tensor:
    return _factored_norm(weight, a, b, scaling, square)


@_compiled_row_norm.register_fake
def _(weight: Tensor, a: Tensor, b: Tensor, scaling: float, square: Tensor | None) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=torch.promote_types(weight.dtype, torch.float32))


def _row_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float, square: Tensor | None) -> Tensor:
    """One operator to the compiler, which cannot know how many rows nearly cancel."""
    return (_compiled_row_norm if torch.compiler.is_compiling() else _factored_norm)(weight, a, b, scaling, square)


def _factored_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float, square: Tensor | None) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    square = row_square(weight) if square is None else square
    with torch.autocast(weight.device.type, enabled=False):
        u = torch.cat([block @ a.T for block in _blocks(weight, wide)])
        cross = torch.addmm(u, b, a @ a.T, beta=2 * scaling, alpha=scaling**2)
        squared = square + (b * cross).sum(1)
        norm = squared.sqrt()
        cancelled = (squared < CANCELLED * square).nonzero()[:, 0]
        for rows in cancelled.split(BLOCK):
            direct = weight.index_select(0, rows).to(wide).addmm_(b.index_select(0, rows), a, alpha=scaling)
            norm.index_copy_(0, rows, torch.linalg.vector_norm(direct, dim=1))
    return norm


def _blocks(weight: Tensor, wide: torch.dtype) -> Iterator[Tensor]:
    """W in dtype `wide`: itself, or widened a block of rows at a time."""
    if weight.dtype == wide:
        yield weight
        return
    for block in weight.split(BLOCK):
        yield block.to(wide)
