"""SigLIP over packed patches: every image at its own resolution (NaViT), none padded.

Source: transformers `models/idefics2/modeling_idefics2.py`, Idefics2VisionTransformer. P patches, C width, N heads, H head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idefics2_fast import ops
from idefics2_fast.config import VisionConfig
from idefics2_fast.kernels.segments import Segments
from idefics2_fast.layers import BASE, Embedding, Linear, Route, add, by_rows

# Patches that go through the tower together on a CPU without gradients. Activations of more than some 30 MB would be returned to the
# system and faulted in anew by every operation; a few images are enough rows for the matrix products.
PATCHES = 4096


class PatchEmbedding(nn.Module):
    """Patches [P, 3 * 14 * 14] and their table rows [P] to embeddings [P, C]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.projection = Linear(config.patch_dim, config.hidden_size)
        self.position_embedding = Embedding(config.positions_per_side**2, config.hidden_size)

    def forward(self, patches: Tensor, positions: Tensor) -> Tensor:
        return add(self._project(patches), self.position_embedding(positions))

    def _project(self, patches: Tensor) -> Tensor:
        """Floats are projected as they are; bytes x stand for (x / 255 - 0.5) / 0.5 = (x - 128) / 127.5 + 1 / 255.

        x - 128 is exact in bf16, and the weight stays the checkpoint's own. The result is rounded once, and where the product is one of
        half precision its bias before it.
        """
        weight, bias = self.projection.weight, self.projection.bias
        if patches.dtype != torch.uint8:
            return self.projection(patches.to(weight.dtype))
        wide = torch.promote_types(weight.dtype, torch.float32)
        shift = bias.to(wide) + weight.sum(1, dtype=wide) / 255
        if ops.choose("linear", weight) == "upcast":
            centred = patches.to(wide).sub_(128)
            return torch.addmm(shift, centred, weight.to(wide).T, alpha=1 / 127.5).to(weight.dtype)
        centred = patches.to(weight.dtype).sub_(128)
        return torch.addmm(shift.to(bias.dtype), centred, weight.T, alpha=1 / 127.5)


class VisionAttention(nn.Module):
    """Full attention within an image."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.qkv_proj = Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, images: Segments, route: Route = BASE) -> Tensor:
        q, k, v = self.qkv_proj(x, route).view(-1, 3, self.heads, self.head_dim).unbind(1)
        return self.out_proj(ops.segment_attention(q, k, v, images, scale=self.head_dim**-0.5).flatten(1), route)


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, route: Route = BASE) -> Tensor:
        hidden = self.fc1(x, route)
        act = F.gelu if torch.is_grad_enabled() else torch.ops.aten.gelu_
        return self.fc2(act(hidden, approximate="tanh"), route)


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, images: Segments, route: Route = BASE) -> Tensor:
        x = add(x, self.self_attn(self.layer_norm1(x), images, route))
        return add(x, by_rows(lambda rows: self.mlp(self.layer_norm2(rows), route), x))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbedding(config)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor, positions: Tensor, images: Segments, route: Route = BASE) -> Tensor:
        """Features [P, C] of packed images.

        Args:
            patches: [P, 3 * 14 * 14], uint8 or normalised floats, in Conv2d's order (channel, row, column).
            positions: int64 [P], rows of the position table.
            images: I segments over the P patches.
            route: the named adapter of all images.
        """
        if torch.is_grad_enabled() or patches.is_cuda:
            return self._encode(patches, positions, images, route)
        groups = by_total(images.lengths, PATCHES)
        rows = [sum(lengths) for lengths in groups]
        pieces = zip(patches.split(rows), positions.split(rows), groups, strict=True)
        return torch.cat([self._encode(p, at, Segments.of_lengths(lengths), route) for p, at, lengths in pieces])

    def _encode(self, patches: Tensor, positions: Tensor, images: Segments, route: Route) -> Tensor:
        x = self.embeddings(patches, positions)
        for layer in self.layers:
            x = layer(x, images, route)
        return self.post_layernorm(x)


def by_total(lengths: list[int], most: int) -> list[list[int]]:
    """Neighbours in groups whose sum is at most `most`; what is longer stands alone."""
    groups: list[list[int]] = []
    for length in lengths:
        if groups and sum(groups[-1]) + length <= most:
            groups[-1].append(length)
        else:
            groups.append([length])
    return groups
