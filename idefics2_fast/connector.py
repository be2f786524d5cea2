"""From the vision tower to the language model: modality projection and perceiver resampler, 64 tokens an image.

Source: transformers `models/idefics2/modeling_idefics2.py`, Idefics2Connector. P patches, I images, L latents, C text width,
N query heads, M key/value heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from idefics2_fast import ops
from idefics2_fast.config import Idefics2Config, PerceiverConfig
from idefics2_fast.kernels.segments import Segments
from idefics2_fast.layers import BASE, GatedMLP, Linear, RMSNorm, Route, add, by_rows


class PerceiverAttention(nn.Module):
    """Latents attend to the context and to themselves."""

    def __init__(self, config: PerceiverConfig, hidden: int) -> None:
        super().__init__()
        self.kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.q_proj = Linear(hidden, config.n_heads * config.head_dim, bias=False)
        self.kv_proj = Linear(hidden, 2 * config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = Linear(config.n_heads * config.head_dim, hidden, bias=False)

    def split(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of `kv_proj`'s output to keys and values [rows, M, H]."""
        k, v = kv.view(-1, 2, self.kv_heads, self.head_dim).unbind(1)
        return k, v

    def forward(self, latents: Tensor, context_kv: Tensor, images: Segments, route: Route = BASE) -> Tensor:
        q = self.q_proj(latents, route).unflatten(1, (-1, self.head_dim))
        context, own = self.split(context_kv), self.split(self.kv_proj(latents, route))
        pooled = ops.perceiver_attention(q, *context, *own, images, scale=self.head_dim**-0.5)
        return self.o_proj(pooled.flatten(1), route)


class PerceiverLayer(nn.Module):
    def __init__(self, config: PerceiverConfig, hidden: int) -> None:
        super().__init__()
        self.input_latents_norm = RMSNorm(hidden, eps=config.rms_norm_eps)
        self.input_context_norm = RMSNorm(hidden, eps=config.rms_norm_eps)
        self.self_attn = PerceiverAttention(config, hidden)
        self.post_attention_layernorm = RMSNorm(hidden, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(hidden, 4 * hidden, hidden)

    def forward(self, latents: Tensor, context_kv: Tensor, images: Segments, route: Route = BASE) -> Tensor:
        latents = add(latents, self.self_attn(self.input_latents_norm(latents), context_kv, images, route))
        return add(latents, self.mlp(self.post_attention_layernorm(latents), route))


class PerceiverResampler(nn.Module):
    def __init__(self, config: PerceiverConfig, hidden: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(config.n_latents, hidden))
        self.layers = nn.ModuleList(PerceiverLayer(config, hidden) for _ in range(config.depth))
        self.norm = RMSNorm(hidden, eps=config.rms_norm_eps)

    def forward(self, context: Tensor, images: Segments, route: Route = BASE) -> Tensor:
        """Context [P, C] of all images to latents [I * L, C]."""
        context_kv = self.context_kv(context, self.folded_kv_weight(route))
        return self.pool(context_kv, images, route)

    def folded_kv_weight(self, route: Route = BASE) -> Tensor:
        """Keys' and values' weights of all layers [depth * 2 * M * H, C], each times its layer's context norm weight.

        The context is the same for all layers, and so is the norm's root mean square: K/V of every layer are one product,
        rms(x)^-1 * x (W * w)^T.
        """
        return torch.cat([layer.self_attn.kv_proj.matrix(route) * layer.input_context_norm.weight for layer in self.layers])

    def context_kv(self, context: Tensor, weight: Tensor) -> Tensor:
        """Keys and values of all layers [P, depth * 2 * M * H] for context rows [P, C] before their norm."""
        return ops.perceiver_context(context, weight, self.norm.eps)

    def pool(self, context_kv: Tensor, images: Segments, route: Route = BASE) -> Tensor:
        latents = self.latents.repeat(len(images), 1)
        for layer, kv in zip(self.layers, context_kv.chunk(len(self.layers), dim=1), strict=True):
            latents = layer(latents, kv, images, route)
        return self.norm(latents)


class Connector(nn.Module):
    def __init__(self, config: Idefics2Config) -> None:
        super().__init__()
        text = config.text
        self.modality_projection = GatedMLP(config.vision.hidden_size, text.intermediate_size, text.hidden_size)
        self.perceiver_resampler = PerceiverResampler(config.perceiver, text.hidden_size)

    def forward(self, features: Tensor, images: Segments, route: Route = BASE) -> Tensor:
        """Vision features [P, width] to image tokens [I * L, C]. Without gradients the context [P, C] is never held whole."""
        resampler = self.perceiver_resampler
        weight = resampler.folded_kv_weight(route)
        context_kv = by_rows(lambda rows: resampler.context_kv(self.modality_projection(rows, route), weight), features)
        return resampler.pool(context_kv, images, route)
