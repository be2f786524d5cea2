"""liger_kernel's RMS norm, gated product and rotary embedding, where it is installed and the tensors are on a GPU.

Its kernels write into what they are given: the gated product's backward pass into its inputs, the rotary embedding into queries and keys.
Where those come from a plain linear layer nobody else holds them. A layer that is wrapped or hooked may have handed its output to somebody
who keeps it, so there a copy is written into.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from idefics2_fast.patching.ledger import is_plain

SILU = ("SiLUActivation", "SiLU")  # transformers' "silu" and "swish"


def installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def suits(device: torch.device) -> bool:
    return device.type == "cuda"


def _own(x: Tensor, maker: nn.Module) -> Tensor:
    return x if is_plain(maker, nn.Linear) else x.clone()


def rms_norm(self: nn.Module, original: Callable[..., Any], hidden_states: Tensor) -> Tensor:
    """MistralRMSNorm.forward, Idefics2RMSNorm.forward."""
    if not suits(hidden_states.device):
        return original(hidden_states)
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon, offset=0.0, casting_mode="llama", in_place=False)


def swiglu(self: nn.Module, original: Callable[..., Any], x: Tensor) -> Tensor:
    """MistralMLP.forward, Idefics2MLP.forward."""
    if not suits(x.device) or type(self.act_fn).__name__ not in SILU:
        return original(x)
    from liger_kernel.transformers.functional import liger_swiglu

    gate, up = _own(self.gate_proj(x), self.gate_proj), _own(self.up_proj(x), self.up_proj)
    return self.down_proj(liger_swiglu(gate, up))


def rotary_attention(
    self: nn.Module,
    original: Callable[..., Any],
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """MistralAttention.forward, of which only the rotary embedding is another."""
    if not suits(hidden_states.device):
        return original(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
    from liger_kernel.transformers.functional import liger_rope
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.mistral.modeling_mistral import eager_attention_forward

    q, k = (_own(project(hidden_states), project) for project in (self.q_proj, self.k_proj))
    q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, self.v_proj(hidden_states)))
    q, k = liger_rope(q, k, *position_embeddings)[:2]
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
    settings = {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
    window = getattr(self.config, "sliding_window", None)
    attended, weights = attend(self, q, k, v, attention_mask, **settings, sliding_window=window, **kwargs)
    return self.o_proj(attended.flatten(2)), weights
