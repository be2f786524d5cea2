"""Where transformers' classes are patched, by which function, and what a report says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from idefics2_fast import ops
from idefics2_fast.patching import liger, loss, vision
from idefics2_fast.patching.vision import Settings


@dataclass(frozen=True)
class Place:
    """A method of a class of transformers, and what stands before it.

    Attributes:
        function: called with the module, the method it stands before, and the method's arguments.
        what: what runs there.
        now: of one instance, what runs there at present.
        obstacle: why nothing is put there; "" where something is.
    """

    cls: type
    method: str
    function: Callable[..., Any]
    what: str
    now: Callable[[nn.Module], str] | None = None
    obstacle: str = ""

    def describe(self, module: nn.Module | None = None) -> str:
        if self.obstacle:
            return f"Hugging Face's: {self.obstacle}"
        return self.what if module is None or self.now is None else self.now(module)


def places(settings: Settings, fused_linear_cross_entropy: bool, rms_norm: bool, swiglu: bool, rope: bool) -> list[Place]:
    """The places of the switches that are on."""
    from transformers.models.idefics2 import modeling_idefics2 as idefics2

    found = []
    if settings.attention:
        found += [
            Place(idefics2.Idefics2Model, "inputs_merger", vision.inputs_merger, "image features copied into their rows"),
            Place(idefics2.Idefics2VisionTransformer, "forward", vision.vision_transformer, "packed patches"),
            Place(idefics2.Idefics2VisionEmbeddings, "forward", vision.vision_embeddings, "packed patches, embedded as rows"),
            Place(idefics2.Idefics2VisionMLP, "forward", vision.vision_mlp, "packed patches, without gradients on a CPU in blocks"),
            Place(idefics2.Idefics2VisionAttention, "forward", vision.vision_attention, *_op("segment_attention")),
        ]
    if settings.perceiver:
        found += [
            Place(idefics2.Idefics2Connector, "forward", vision.connector, "packed patches, without gradients on a CPU in blocks"),
            Place(idefics2.Idefics2PerceiverResampler, "forward", vision.perceiver_resampler, "packed patches"),
            Place(idefics2.Idefics2PerceiverAttention, "forward", vision.perceiver_attention, *_op("perceiver_attention")),
        ]
    if settings.attention or settings.perceiver:
        packed = partial(vision.get_image_features, settings)
        found.append(Place(idefics2.Idefics2Model, "get_image_features", packed, "real patches only, sizes read from the mask"))
    if fused_linear_cross_entropy:
        answers = "the loss of answer rows; logits where asked for"
        found.append(Place(idefics2.Idefics2ForConditionalGeneration, "forward", loss.causal_lm, answers, _head))
    return found + _liger_places(rms_norm, swiglu, rope)


def _liger_places(rms_norm: bool, swiglu: bool, rope: bool) -> list[Place]:
    from transformers.models.idefics2 import modeling_idefics2 as idefics2
    from transformers.models.mistral import modeling_mistral as mistral

    obstacle = "" if liger.installed() else "liger_kernel is not installed"
    switched = [
        (rms_norm, idefics2.Idefics2RMSNorm, liger.rms_norm),
        (rms_norm, mistral.MistralRMSNorm, liger.rms_norm),
        (swiglu, idefics2.Idefics2MLP, liger.swiglu),
        (swiglu, mistral.MistralMLP, liger.swiglu),
        (rope, mistral.MistralAttention, liger.rotary_attention),
    ]
    return [Place(cls, "forward", function, "liger_kernel's", _device, obstacle) for on, cls, function in switched if on]


def _op(op: str) -> tuple[str, Callable[[nn.Module], str]]:
    def now(attention: nn.Module) -> str:
        weight = next(attention.parameters())
        return f"packed patches, {op}: {ops.choose(op, weight.new_empty(0, attention.head_dim))}"

    return f"packed patches, {op}", now


def _head(model: nn.Module) -> str:
    how = "without their logits" if loss.is_fused(model.lm_head) else f"through {type(model.lm_head).__name__}"
    return f"the loss of answer rows {how}; logits where asked for"


def _device(module: nn.Module) -> str:
    device = next(module.parameters(), torch.empty(0)).device
    return "liger_kernel's" if liger.suits(device) else f"Hugging Face's: device {device.type}"
