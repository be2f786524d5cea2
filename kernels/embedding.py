"""Token embedding, image merge and NEFTune: the first hidden states of packed documents, each row written once.

    y_t = x_t + u_t * alpha / sqrt(L C),   x_t = table[id_t], or the image feature whose place t is,   u from U(-1, 1)

L is the length of the token's document, C the width. Source of the noise: NEFTune, arXiv 2310.05914, and its authors' code, where L is the
length without padding. It is counter-based (`kernels/philox.py`): it depends on (seed, step, global token index, column), so it is the
same in every split of a batch, on any device, and when recomputed. Image rows have none unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from idefics2_fast.kernels.philox import uniform
from idefics2_fast.kernels.segments import Segments

MODES = ("document", "huggingface")
# Rows of noise drawn at a time: 128 x 4096 fp32 stay in the last-level cache.
ROWS = 128


@dataclass(frozen=True)
class Noise:
    """NEFTune's noise on T tokens.

    Attributes:
        lengths: int64 [T], L of each token; 0 leaves a token without noise, as padding is.
        tokens: int64 [T], global indices, of any size.
        alpha: the noise's strength.
        seed, step: what the noise is drawn for: 64 and 32 bits.
        images: noise on image rows too, as the authors of Idefics2 have it.
        values: fp32 [T, C], u itself in place of drawn numbers.
    """

    lengths: Tensor
    tokens: Tensor
    alpha: float
    seed: int
    step: int
    images: bool = False
    values: Tensor | None = None

    @classmethod
    def of(
        cls,
        documents: Segments,
        *,
        alpha: float,
        seed: int,
        step: int,
        token_base: int = 0,
        mode: str = "document",
        images: bool = False,
    ) -> Noise:
        """Noise for packed documents on the device of `documents.offsets`.

        Args:
            token_base: global index of the first token.
            mode: "document" takes each document's own length for L; "huggingface" that of the longest, to which transformers pads all.

        Raises:
            ValueError: another mode.
        """
        if mode not in MODES:
            raise ValueError(f"the mode of the noise is {mode!r}, expected one of {', '.join(MODES)}")
        tokens = torch.arange(token_base, token_base + documents.total, device=documents.offsets.device)
        if mode == "huggingface":
            lengths = torch.full_like(tokens, documents.longest)
        else:
            each = documents.offsets.diff().to(torch.int64)
            lengths = each.repeat_interleave(each, output_size=documents.total)
        return cls(lengths, tokens, alpha, seed, step, images)


def reference(
    token_ids: Tensor | None,
    table: Tensor,
    features: Tensor | None = None,
    image_rows: Tensor | None = None,
    noise: Noise | None = None,
    *,
    padding_idx: int | None = None,
) -> Tensor:
    """The formula; the noise is added in fp32 (fp64 for fp64), and the sum rounded once.

    Args:
        token_ids: int64 [T]; None where `table` [T, C] has the tokens' rows already.
        table: [V, C].
        features: [N, C], of the table's dtype.
        image_rows: int64 [N], distinct rows of the output that the features take, in their order.
        noise: None for none.
        padding_idx: a token whose row of the table gets no gradient, as `torch.nn.Embedding` has it.

    Returns:
        [T, C] in the dtype of the table.

    Raises:
        ValueError: places and features differ in number, or shapes or dtypes do not belong together.
    """
    check(token_ids, table, features, image_rows, noise)
    x = table if token_ids is None else F.embedding(token_ids, table, padding_idx)
    if features is not None:
        x = x.index_copy(0, image_rows, features)
    if noise is None:
        return x
    width = x.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    drawn = uniform(noise.seed, noise.step, noise.tokens, width) if noise.values is None else noise.values
    scales = _scales(noise.lengths, None if noise.images else image_rows, noise.alpha, width, dtype)
    return (x.to(dtype) + drawn * scales[:, None]).to(x.dtype)


def check(token_ids: Tensor | None, table: Tensor, features: Tensor | None, image_rows: Tensor | None, noise: Noise | None) -> None:
    """What can be told on the host.

    Raises:
        ValueError: see `reference`.
    """
    tokens, width = (table if token_ids is None else token_ids).shape[0], table.shape[1]
    places, given = (0 if image_rows is None else image_rows.shape[0]), (0 if features is None else features.shape[0])
    if places != given:
        raise ValueError(f"the text has {places} places for image features, but {given} features are given")
    if features is not None and (features.shape[1:] != (width,) or features.dtype != table.dtype):
        raise ValueError(f"features are {features.dtype} {list(features.shape)}, expected {table.dtype} [{given}, {width}] as the table")
    if noise is None:
        return
    if noise.lengths.shape != (tokens,) or noise.tokens.shape != (tokens,):
        raise ValueError(
            f"the noise's lengths {list(noise.lengths.shape)} and tokens {list(noise.tokens.shape)}, expected [{tokens}] as the tokens"
        )
    if noise.values is not None and noise.values.shape != (tokens, width):
        raise ValueError(f"the noise's values are {list(noise.values.shape)}, expected {[tokens, width]}")


def _scales(lengths: Tensor, silent: Tensor | None, alpha: float, width: int, dtype: torch.dtype) -> Tensor:
    """alpha / sqrt(L C) of each token, 0 where L is 0 and in the rows `silent`."""
    scales = torch.where(lengths > 0, (lengths * width).to(dtype).sqrt().reciprocal() * alpha, 0.0)
    return scales if silent is None else scales.index_fill(0, silent, 0.0)


def _forward(token_ids: Tensor | None, table: Tensor, features: Tensor | None, image_rows: Tensor | None, noise: Noise | None) -> Tensor:
    """`reference` in the output's own memory; numbers are drawn for the rows that have noise alone."""
    out = table.clone(memory_format=torch.contiguous_format) if token_ids is None else table.index_select(0, token_ids)
    if features is not None:
        out.index_copy_(0, image_rows, features)
    if noise is None:
        return out
    width, dtype = table.shape[1], torch.promote_types(table.dtype, torch.float32)
    scales = _scales(noise.lengths, None if noise.images else image_rows, noise.alpha, width, dtype)
    for rows in scales.nonzero()[:, 0].split(ROWS):
        if noise.values is None:
            drawn = uniform(noise.seed, noise.step, noise.tokens.index_select(0, rows), width)
        else:
            drawn = noise.values.index_select(0, rows)
        added = drawn * scales.index_select(0, rows)[:, None]
        out.index_copy_(0, rows, (out.index_select(0, rows).to(dtype) + added).to(out.dtype))
    return out


def _table_grad(grad: Tensor, token_ids: Tensor, image_rows: Tensor | None, size: int, padding_idx: int | None) -> Tensor:
    """[V, C]: a token's row is the sum of the gradients of its places, in their order and at least in fp32, rounded once."""
    counts = torch.ones_like(token_ids, dtype=torch.bool) if padding_idx is None else token_ids != padding_idx
    if image_rows is not None:
        counts.index_fill_(0, image_rows, False)
    places = counts.nonzero()[:, 0]
    tokens, segments = token_ids.index_select(0, places).unique(return_inverse=True)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    sums = grad.new_zeros(tokens.shape[0], grad.shape[1], dtype=dtype).index_add_(0, segments, grad.index_select(0, places).to(dtype))
    return grad.new_zeros(size, grad.shape[1]).index_copy_(0, tokens, sums.to(grad.dtype))


# forward(token_ids, table, features, image_rows, noise) -> [T, C]
Forward = Callable[[Tensor | None, Tensor, Tensor | None, Tensor | None, Noise | None], Tensor]
# table_grad(grad [T, C], token_ids, image_rows, V, padding_idx) -> [V, C]
TableGrad = Callable[[Tensor, Tensor, Tensor | None, int, int | None], Tensor]


def differentiable(name: str, forward: Forward, table_grad: TableGrad) -> Callable[..., Tensor]:
    """An implementation with the signature of `reference`, out of its output and its gradient by the table.

    Both become operators of torch, `idefics2_fast::<name>` and `idefics2_fast::<name>_table_grad`, which its compiler does not look into.
    """
    grad_of_table = torch.library.custom_op(f"idefics2_fast::{name}_table_grad", table_grad, mutates_args=())
    grad_of_table.register_fake(lambda grad, token_ids, image_rows, size, padding_idx: grad.new_empty(size, grad.shape[1]))

    @torch.library.custom_op(f"idefics2_fast::{name}", mutates_args=())
    def operator(
        token_ids: Tensor | None,
        table: Tensor,
        features: Tensor | None,
        image_rows: Tensor | None,
        lengths: Tensor | None,
        tokens: Tensor | None,
        values: Tensor | None,
        alpha: float,
        seed: int,
        step: int,
        images: bool,
        padding_idx: int | None,
    ) -> Tensor:
        noise = None if lengths is None else Noise(lengths, tokens, alpha, seed, step, images, values)
        return forward(token_ids, table, features, image_rows, noise)

    @operator.register_fake
    def _(token_ids: Tensor | None, table: Tensor, *_: object) -> Tensor:
        return table.new_empty((table if token_ids is None else token_ids).shape[0], table.shape[1])

    operator.register_autograd(partial(_backward, grad_of_table), setup_context=_set_up)
    return partial(_call, operator)


def _set_up(ctx, inputs: tuple, output: Tensor) -> None:
    token_ids, table, _, image_rows, *_, padding_idx = inputs
    ctx.save_for_backward(token_ids, image_rows)
    ctx.size, ctx.padding_idx = table.shape[0], padding_idx


def _backward(grad_of_table: TableGrad, ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    token_ids, image_rows = ctx.saved_tensors
    _, needs_table, needs_features, *others = ctx.needs_input_grad
    of_table = of_features = None
    if needs_table and token_ids is None:
        of_table = grad if image_rows is None else grad.index_fill(0, image_rows, 0)
    elif needs_table:
        of_table = grad_of_table(grad, token_ids, image_rows, ctx.size, ctx.padding_idx)
    if needs_features:
        of_features = grad.index_select(0, image_rows)
    return None, of_table, of_features, *[None] * len(others)


def _call(
    operator: Callable[..., Tensor],
    token_ids: Tensor | None,
    table: Tensor,
    features: Tensor | None = None,
    image_rows: Tensor | None = None,
    noise: Noise | None = None,
    *,
    padding_idx: int | None = None,
) -> Tensor:
    check(token_ids, table, features, image_rows, noise)
    image_rows = None if features is None else image_rows
    if noise is None:
        return operator(token_ids, table, features, image_rows, None, None, None, 0.0, 0, 0, False, padding_idx)
    seed = (noise.seed + 2**63) % 2**64 - 2**63  # operators take signed numbers
    drawn = noise.lengths, noise.tokens, noise.values, noise.alpha, seed, noise.step, noise.images
    return operator(token_ids, table, features, image_rows, *drawn, padding_idx)


cpu = differentiable("embedding", _forward, _table_grad)
