"""Linear layer and cross-entropy in one, over the rows that carry loss.

    z = h W^T,   lse = log sum exp z,   loss = sum over rows of w * (lse - z[target] + z_loss * lse^2)
    dz = w * ((1 + 2 * z_loss * lse) * softmax(z) - onehot(target)),   dh = dz W,   dW = dz^T h

The gradients are made in the forward pass, chunk by chunk, so that logits exist for one chunk of rows only; the backward pass scales them.
Sum and count come back apart: what the sum is divided by is the caller's (all ranks', all accumulated batches' rows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from idefics2_fast.kernels.linear import needs_upcast

IGNORED = -100

# Logits at a time. CPU: 32 MiB in fp32, 256 rows of 32003, faster than 128 and fewer on two Zen 3 cores; elsewhere 1 GiB.
LOGITS = {"cpu": 1 << 23}
MANY_LOGITS = 1 << 28
# Products take whole multiples of so many rows: of 103 they run at two thirds of the speed of 112.
MULTIPLE = 16
# Rows of W that are widened at a time where products are wider than W.
BLOCK = 512


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, row_weights: Tensor | None = None, ignore_index: int = IGNORED, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The formula through full logits, in fp32 (fp64 for fp64); see `chunked`."""
    _check(hidden, weight, targets, row_weights)
    wide = _wide_dtype(hidden, weight)
    logits = F.linear(hidden.to(wide), weight.to(wide))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast rounds them
    losses = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    counted = targets != ignore_index
    losses = losses + z_loss * logits.logsumexp(1).square() * counted
    return (losses if row_weights is None else losses * row_weights).sum(), counted.sum()


def chunked(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, row_weights: Tensor | None = None, ignore_index: int = IGNORED, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The sum of the rows' losses, and how many rows count.

    On a CPU the products are in fp32 at least, whether or not it has half-precision units: these would round logits to the operands'
    dtype, an error of 2^-9 of a logit in bf16. Under autocast, and on other devices, products are in the dtype of a linear layer's.

    Args:
        hidden: [R, C], after the last norm.
        weight: [V, C], the head's.
        targets: int64 [R]; the token that each row predicts.
        row_weights: [R], constants; None for 1.
        ignore_index: the target of rows that do not count.
        z_loss: weight of the squared log of the softmax's denominator.

    Returns:
        The sum, fp32 (fp64 for fp64), differentiable once by `hidden` and `weight`; the count, int64, whatever the rows weigh.

    Raises:
        ValueError: shapes that do not belong together.
    """
    return sum_and_count(_forward, hidden, weight, targets, row_weights, ignore_index, z_loss)


def answer_rows(hidden: Tensor, labels: Tensor, *, shifted: bool = False, ignore_index: int = IGNORED) -> tuple[Tensor, Tensor]:
    """The rows of a padded batch that carry loss, and what they predict.

    Args:
        hidden: [B, S, C].
        labels: int64 [B, S], `ignore_index` where nothing is trained. Position s predicts label s + 1, or label s where `shifted`.

    Returns:
        hidden rows [R, C], whose gradient is the same in every run, and int64 targets [R].

    Raises:
        ValueError: labels of another shape.
    """
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels have shape {list(labels.shape)}, expected {list(hidden.shape[:-1])} as hidden")
    targets = (labels if shifted else F.pad(labels, (0, 1), value=ignore_index)[..., 1:]).flatten().to(hidden.device)
    rows = (targets != ignore_index).nonzero()[:, 0]
    return hidden.flatten(0, -2).index_select(0, rows), targets.index_select(0, rows)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor | None) -> None:
    rows, width = hidden.shape if hidden.ndim == 2 else (-1, -1)
    if rows < 0 or weight.ndim != 2 or weight.shape[1] != width:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)}, expected [R, C] and [V, C]")
    for name, tensor in (("targets", targets), ("row_weights", row_weights)):
        if tensor is not None and tensor.shape != (rows,):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{rows}] as the rows of hidden")


def _wide_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """At least fp32 on a CPU: its products of half precision have no wider output.

    Elsewhere, and under autocast, as a linear layer would multiply; in fp32 where a CPU multiplies half precision number by number.
    """
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return torch.float32 if needs_upcast(device, dtype) else dtype
    return _wide_dtype(hidden, weight) if device == "cpu" else dtype


def sum_and_count(
    op: Callable[..., tuple[Tensor, Tensor, Tensor]],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor | None,
    ignore_index: int,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """`chunked` by an operator that `operator` has made."""
    _check(hidden, weight, targets, row_weights)
    grad = torch.is_grad_enabled()
    wanted = grad and hidden.requires_grad, grad and weight.requires_grad
    total, _, _ = op(hidden, weight, targets, row_weights, ignore_index, z_loss, _product_dtype(hidden, weight), *wanted)
    return total, (targets != ignore_index).sum()


# room(like, V, rows, dtype): memory for logits [V, rows]; losses(logits [V, r], targets, row_weights, ignore_index, z_loss, gradient): [r]
Room = Callable[[Tensor, int, int, torch.dtype], Tensor]
Losses = Callable[[Tensor, Tensor, Tensor | None, int, float, bool], Tensor]


def operator(name: str, room: Room, losses: Losses) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """An operator of torch: the sum, and its gradients by hidden and weight, empty where not wanted, all at least fp32.

    Args:
        room, losses: where a chunk's logits are, in at least the products' precision, and how they become losses and their gradient.
    """

    @torch.library.custom_op(f"idefics2_fast::{name}", mutates_args=())
    def forward(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        row_weights: Tensor | None,
        ignore_index: int,
        z_loss: float,
        dtype: torch.dtype,
        wants_hidden: bool,
        wants_weight: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs = _outputs(hidden, weight, wants_hidden, wants_weight)

        def losses_of(logits: Tensor, chunk: slice) -> Tensor:
            factors = None if row_weights is None else row_weights[chunk]
            return losses(logits, targets[chunk], factors, ignore_index, z_loss, wants_hidden or wants_weight)

        with torch.autocast(hidden.device.type, enabled=False):
            _by_chunks(*outputs, hidden, weight, targets != ignore_index, dtype, room, losses_of)
        return outputs

    @forward.register_fake
    def _(hidden, weight, targets, row_weights, ignore_index, z_loss, dtype, wants_hidden, wants_weight):
        return _outputs(hidden, weight, wants_hidden, wants_weight)

    forward.register_autograd(_backward, setup_context=_setup_context)
    return forward


def _by_chunks(
    total: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    hidden: Tensor,
    weight: Tensor,
    counted: Tensor,
    dtype: torch.dtype,
    room: Room,
    losses_of: Callable[[Tensor, slice], Tensor],
) -> None:
    """Fills the operator's outputs. `counted`: bool [R], the rows that count; `dtype`: the products'."""
    rows, classes = hidden.shape[0], weight.shape[0]
    chunks = -(-rows // max(1, LOGITS.get(hidden.device.type, MANY_LOGITS) // classes))
    size = _up(-(-rows // max(1, chunks)))
    buffer = room(total, classes, size, dtype)
    total.zero_()
    grad_weight.zero_()
    for start in range(0, rows, max(1, size)):
        chunk = slice(start, start + size)
        h = torch.where(counted[chunk, None], hidden[chunk], 0).to(dtype)  # a row that does not count may hold anything, NaN too
        padded = F.pad(h, (0, 0, 0, _up(h.shape[0]) - h.shape[0]))
        for block, wide in _blocks(weight, dtype):
            _multiply(wide, padded.T, out=buffer[block, : padded.shape[0]])
        logits = buffer[:, : h.shape[0]]
        total += losses_of(logits, chunk).sum()
        if grad_hidden.ndim == 2:
            rows_of = buffer[:, : padded.shape[0]]  # a product of two or three rows would sum in another order, less exactly
            grad_padded = grad_hidden.new_zeros(padded.shape)
            for block, wide in _blocks(weight, dtype):
                _multiply(rows_of[block].T.to(dtype), wide, out=grad_padded, add=True)
            grad_hidden[chunk] = grad_padded[: h.shape[0]]
        if grad_weight.ndim == 2:
            _multiply(logits.to(dtype), h, out=grad_weight, add=True)


def _outputs(hidden: Tensor, weight: Tensor, wants_hidden: bool, wants_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what the operator returns."""
    wide = _wide_dtype(hidden, weight)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape if wants_hidden else (0,), dtype=wide),
        weight.new_empty(weight.shape if wants_weight else (0,), dtype=wide),
    )


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


@once_differentiable
def _backward(ctx, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    made = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    return *((saved * grad).to(dtype) if needed else None for saved, dtype, needed in made), *[None] * 7


def _up(rows: int) -> int:
    """The next multiple of `MULTIPLE`."""
    return -(-rows // MULTIPLE) * MULTIPLE


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """`weight` in `dtype`: widened block by block, else whole, as sums of products in half precision would lose digits."""
    size = BLOCK if weight.dtype.itemsize < dtype.itemsize else weight.shape[0]
    for start in range(0, weight.shape[0], size):
        block = slice(start, start + size)
        yield block, weight[block].to(dtype)


def _multiply(a: Tensor, b: Tensor, *, out: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b; `out` may be of a wider dtype."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif add:
        out += a @ b
    else:
        out.copy_(a @ b)


def _losses(logits: Tensor, targets: Tensor, row_weights: Tensor | None, ignore_index: int, z_loss: float, gradient: bool) -> Tensor:
    """The losses [r] of logits [V, r], whose memory is taken: where `gradient`, by the gradient of the losses' sum."""
    counted = targets != ignore_index
    target = torch.where(counted, targets, 0)[None]
    weights = counted.to(logits.dtype) if row_weights is None else counted * row_weights.to(logits.dtype)
    largest = logits.amax(0)
    chosen = logits.sub_(largest).gather(0, target)[0]
    denominator = logits.exp_().sum(0)
    log_denominator = denominator.log()
    lse = log_denominator + largest
    losses = torch.where(counted, (log_denominator - chosen + z_loss * lse.square()) * weights, 0)
    if gradient:
        logits.mul_(weights * (1 + 2 * z_loss * lse) / denominator).scatter_add_(0, target, -weights[None])
    return losses


def _room(like: Tensor, classes: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Memory for logits [V, rows], a column each row: W h^T is faster than h W^T on a CPU, and V may be odd."""
    return like.new_empty(classes, rows)


_forward = operator("linear_cross_entropy", _room, _losses)
