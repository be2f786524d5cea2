"""Mistral over packed documents: grouped-query attention, rotary positions, RMSNorm, an optional sliding window.

Source: transformers `models/mistral/modeling_mistral.py`. T tokens, C width, N query heads, M key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from idefics2_fast.config import TextConfig
from idefics2_fast.layers import BASE, Embedding, GatedMLP, Linear, RMSNorm, Route, add, by_rows

# attend(layer index, q [T, N, H], k [T, M, H], v [T, M, H]) -> [T, N, H]: packed documents, or a cache
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def rotary_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin [T, 1, H] of positions [T], computed in fp32.

    Rotating x by them is x * cos + roll(x, H / 2) * sin, with the sign of rotate_half in the sine.
    """
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim)
    angles = positions[:, None].float() * inverse
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((-sin, sin), -1)[:, None].to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on x [T, heads, H]."""
    cos, sin = table
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class TextAttention(nn.Module):
    def __init__(self, config: TextConfig, index: int) -> None:
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.qkv_proj = Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, route: Route = BASE) -> Tensor:
        qkv = self.qkv_proj(x, route).view(x.shape[0], -1, self.head_dim)
        qk, v = qkv.split_with_sizes((self.heads + self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(qk, rotary).split_with_sizes((self.heads, self.kv_heads), dim=1)
        return self.o_proj(attend(self.index, q, k, v).flatten(1), route)


class TextLayer(nn.Module):
    def __init__(self, config: TextConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = TextAttention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, route: Route = BASE) -> Tensor:
        x = add(x, self.self_attn(self.input_layernorm(x), rotary, attend, route))
        return add(x, by_rows(lambda rows: self.mlp(self.post_attention_layernorm(rows), route), x))


class TextModel(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TextLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The rotary table of positions (int64 [T]); see `rotary_table`."""
        return rotary_table(positions, self.config.head_dim, self.config.rope_theta, dtype)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, route: Route = BASE) -> Tensor:
        """Hidden states [T, C] before the last norm, from embeddings [T, C], which are overwritten when no gradient is asked.

        Args:
            rotary: cos and signed sin [T, 1, H] of the tokens' positions.
            attend: where keys and values come from; see `Attend`.
            route: the named adapters of the rows.
        """
        for layer in self.layers:
            x = layer(x, rotary, attend, route)
        return x
