"""Decode attention: one new token a sequence attends to that sequence's rows of a flat key/value cache.

    out_d = sum_j softmax_j(scale * q_d . k_j) v_j,   j over the last `window` of sequence d's rows

Legend: D sequences, R rows of the cache, N query heads, M key/value heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """Where D sequences stand in the cache.

    Attributes:
        starts: int64 [D], first row of each sequence's region.
        lengths: int64 [D], rows in use, the new token's included.
        capacity: rows of the largest region: the static shape that a captured graph is made for.
    """

    starts: Tensor
    lengths: Tensor
    capacity: int

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """First row and end of every sequence, on the host. On a GPU this waits for the device: only CPU paths ask."""
        return [(start, start + length) for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True)]


def reference(q: Tensor, k: Tensor, v: Tensor, slots: Slots, *, window: int | None, scale: float) -> Tensor:
    """The formula in the inputs' dtype (fp64 included). Shapes as in `sdpa_ragged`."""
    groups = q.shape[1] // k.shape[1]
    outputs = []
    for q_d, (start, end) in zip(q, slots.bounds, strict=True):
        rows = slice(start if window is None else max(start, end - window), end)
        weights = (torch.einsum("nh,jnh->nj", q_d, k[rows].repeat_interleave(groups, 1)) * scale).softmax(-1)
        outputs.append(torch.einsum("nj,jnh->nh", weights, v[rows].repeat_interleave(groups, 1)))
    return torch.stack(outputs)


def sdpa_ragged(q: Tensor, k: Tensor, v: Tensor, slots: Slots, *, window: int | None, scale: float) -> Tensor:
    """Each sequence's own rows and no others: the CPU path.

    Args:
        q: [D, N, H]; k, v: [R, M, H], the flat cache of one layer.
        window: rows that the new token sees, itself included; None for all.

    Returns:
        [D, N, H]
    """
    shape = q.shape
    q = q.reshape(shape[0], 1, k.shape[1], -1, shape[2])  # the heads of a KV head are queries of the same keys
    outputs = []
    for q_d, (start, end) in zip(q, slots.bounds, strict=True):
        rows = slice(start if window is None else max(start, end - window), end)
        outputs.append(F.scaled_dot_product_attention(q_d, k[rows].transpose(0, 1)[None], v[rows].transpose(0, 1)[None], scale=scale))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out.reshape(shape)


def sdpa_static(q: Tensor, k: Tensor, v: Tensor, slots: Slots, *, window: int | None, scale: float) -> Tensor:
    """`sdpa_ragged` with shapes that depend on `slots.capacity` alone, for CUDA graphs: gathers every region whole and masks."""
    column = torch.arange(slots.capacity, device=q.device)
    rows = (slots.starts[:, None] + column).clamp_(max=k.shape[0] - 1)
    visible = column < slots.lengths[:, None]
    if window is not None:
        visible &= column >= slots.lengths[:, None] - window
    k, v = (x.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2) for x in (k, v))  # D, M, capacity, H
    q = q.unflatten(1, (k.shape[1], -1))  # D, M, N/M, H
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None], scale=scale).flatten(1, 2)
