"""Perceiver pooling attention: the latents of an image attend to its context and to themselves.

    out = softmax(scale * q [k_context ; k_latents]^T) [v_context ; v_latents],   image by image

Legend: I images, L latents per image, P context rows of all images, N query heads, M key/value heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from idefics2_fast.kernels import segment_attention
from idefics2_fast.kernels.segments import Segments


def reference(
    q: Tensor, k_context: Tensor, v_context: Tensor, k_latents: Tensor, v_latents: Tensor, images: Segments, *, scale: float
) -> Tensor:
    """The formula in the inputs' dtype (fp64 included). Shapes as in `sdpa`."""
    groups = q.shape[1] // k_context.shape[1]
    outputs = []
    for q_i, *keys_values in _by_image(q, k_context, v_context, k_latents, v_latents, images):
        k, v = (torch.cat(pair).repeat_interleave(groups, 1) for pair in (keys_values[::2], keys_values[1::2]))
        weights = (torch.einsum("inh,jnh->nij", q_i, k) * scale).softmax(-1)
        outputs.append(torch.einsum("nij,jnh->inh", weights, v))
    return torch.cat(outputs)


def sdpa(
    q: Tensor, k_context: Tensor, v_context: Tensor, k_latents: Tensor, v_latents: Tensor, images: Segments, *, scale: float
) -> Tensor:
    """One scaled_dot_product_attention for neighbours of one size, the query heads of a KV head packed: the CPU path.

    Args:
        q: [I * L, N, H]; k_latents, v_latents: [I * L, M, H]; k_context, v_context: [P, M, H].
        images: I segments over the P context rows.

    Returns:
        [I * L, N, H]
    """
    latents, outputs, start = q.shape[0] // max(1, len(images)), [], 0
    for length, count, context in segment_attention.runs(images, k_context, v_context):
        own = (x.narrow(0, start * latents, count * latents) for x in (k_latents, v_latents, q))
        *own, q_run = (x.unflatten(0, (count, latents)) for x in own)
        k, v = (torch.cat((c.unflatten(0, (count, length)), o), dim=1) for c, o in zip(context, own, strict=True))
        outputs.append(segment_attention.attend(q_run, k, v, scale=scale).flatten(0, 1))
        start += count
    return torch.cat(outputs) if outputs else torch.empty_like(q)


def _by_image(q: Tensor, k_context: Tensor, v_context: Tensor, k_latents: Tensor, v_latents: Tensor, images: Segments) -> zip:
    latents = q.shape[0] // len(images)
    context = (x.split(images.lengths) for x in (k_context, v_context))
    own = (x.split(latents) for x in (k_latents, v_latents))
    k_c, v_c, k_l, v_l = *context, *own
    return zip(q.split(latents), k_c, v_c, k_l, v_l, strict=True)
