"""The name `attn_implementation="idefics2_fast"` for transformers' models."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from idefics2_fast import ops
from idefics2_fast.kernels.segments import Segments

NAME = "idefics2_fast"


def register_attention() -> None:
    """Makes `attn_implementation="idefics2_fast"` known to transformers, for `from_pretrained` and `set_attn_implementation`.

    The mask function is registered with it: without one, transformers hands over None for a mask, and padded samples go wrong in silence.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | Segments | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [B, N, Tq, H], key and value [B, M, Tk, H] -> [B, Tq, N, H], and no weights.

    Packed rows (B = 1) come with `Segments` for a mask: each attends to itself alone, causally where the module is causal. Masks that
    transformers makes are SDPA's, and so is what they are handed to.
    """
    if not isinstance(attention_mask, Segments):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    causal = bool(kwargs.get("is_causal", getattr(module, "is_causal", True)))
    window = kwargs.get("sliding_window") if causal else None
    return ops.segment_attention(q, k, v, attention_mask.to(q.device), scale=kwargs["scaling"], causal=causal, window=window)[None], None
