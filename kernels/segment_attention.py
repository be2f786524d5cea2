"""Attention within segments: every document, or image, of a packed axis attends to itself alone.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j,   j over i's segment; causal: j <= i; window: j > i - window

Legend: T rows, S segments, N query heads, M key/value heads (N a multiple of M), H head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from idefics2_fast.kernels.segments import Segments

# Queries of one masked call under a sliding window; bounds the mask to WINDOW_BLOCK x (window + WINDOW_BLOCK).
WINDOW_BLOCK = 1024


def reference(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, window: int | None, scale: float) -> Tensor:
    """The formula, segment by segment, in the inputs' dtype (fp64 included). Shapes as in `sdpa`."""
    groups = q.shape[1] // k.shape[1]
    outputs = []
    for q_s, k_s, v_s in zip(*(x.split(segments.lengths) for x in (q, k, v)), strict=True):
        scores = torch.einsum("inh,jnh->nij", q_s, k_s.repeat_interleave(groups, 1)) * scale
        row, column = torch.arange(q_s.shape[0])[:, None], torch.arange(k_s.shape[0])
        hidden = (column > row) & causal
        if window is not None:
            hidden = hidden | (column <= row - window)
        weights = scores.masked_fill(hidden.to(scores.device), float("-inf")).softmax(-1)
        outputs.append(torch.einsum("nij,jnh->inh", weights, v_s.repeat_interleave(groups, 1)))
    return torch.cat(outputs)


def sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, window: int | None, scale: float) -> Tensor:
    """One scaled_dot_product_attention for neighbours of one length: the CPU path.

    Args:
        q: [T, N, H]; k, v: [T, M, H]; rows may be strided, the last axis must not be.
        window: keys that a causal query sees, itself included; None for all.

    Returns:
        [T, N, H]
    """
    outputs = []
    for length, count, pieces in runs(segments, q, k, v):
        if length:
            pieces = (piece.unflatten(0, (count, length)) for piece in pieces)
            outputs.append(attend(*pieces, causal=causal, window=window, scale=scale).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs) if outputs else torch.empty_like(q)


def runs(segments: Segments, *packed: Tensor) -> Iterator[tuple[int, int, tuple[Tensor, ...]]]:
    """Neighbours of one length, which one call treats together: their length, how many they are, and their rows of each tensor."""
    start = 0
    for length, group in groupby(segments.lengths):
        count = len(list(group))
        yield length, count, tuple(x.narrow(0, start, count * length) for x in packed)
        start += count * length


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int | None = None, scale: float) -> Tensor:
    """Attention of S segments, q [S, Tq, N, H] to k, v [S, Tk, M, H]. Causal needs Tq = Tk. Keys are never repeated per query head."""
    count, rows, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = q.unflatten(2, (kv_heads, heads // kv_heads)).permute(0, 2, 3, 1, 4)  # S, M, N/M, T, H
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # S, M, T, H
    if causal:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        k, v = (x[:, None].expand(-1, heads // kv_heads, -1, -1) for x in (k, v))
        if window is None or rows <= window:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            out = _windowed(q, k, v, window, scale)
    else:
        # every query of a KV head sees the same keys, so its heads' rows stand behind one another
        out = F.scaled_dot_product_attention(q.flatten(2, 3), k, v, scale=scale)
    return out.view(count, kv_heads, heads // kv_heads, rows, dim).permute(0, 3, 1, 2, 4).reshape(count, rows, heads, dim)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    rows, outputs = q.shape[2], []
    for start in range(0, rows, WINDOW_BLOCK):
        end, first = min(start + WINDOW_BLOCK, rows), max(0, start - window + 1)
        row, column = torch.arange(start, end, device=q.device)[:, None], torch.arange(first, end, device=q.device)
        visible = (column <= row) & (column > row - window)
        piece = (q[:, :, start:end], k[:, :, first:end], v[:, :, first:end])
        outputs.append(F.scaled_dot_product_attention(*piece, attn_mask=visible, scale=scale))
    return torch.cat(outputs, dim=2)
