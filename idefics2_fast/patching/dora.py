"""DoRA of PEFT's linear layers, computed by `kernels/dora_linear.py`.

PEFT keeps, for every adapter of a layer, an object that says how the adapter is computed (`layer.lora_variant[name]`). `dora_variant` makes
one that replaces PEFT's own: a subclass with another `forward`, so that merging, unmerging, initialisation and the state stay PEFT's.
Its class is made when it is first asked for: importing this module imports neither PEFT nor transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from idefics2_fast import ops
from idefics2_fast.row_norm import RowNorm

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
logger = logging.getLogger(__name__)


class Unsupported(ValueError):
    """A layer whose adapter is left to PEFT; the message says why."""


def dora_variant(layer: nn.Module, adapter: str) -> Any:
    """What takes the place of `layer.lora_variant[adapter]`: the same function of the same parameters, without their product.

    Norms are kept between passes as long as a `row_norm.OptimizerSteps` counts.

    Args:
        layer: PEFT's wrapper of a linear layer.
        adapter: name of an adapter of it that uses DoRA.

    Raises:
        Unsupported: a ValueError; the layer is not one of those.
    """
    if reason := _obstacle(layer, adapter):
        raise Unsupported(f"adapter {adapter!r} of {type(layer).__name__} is left to PEFT: {reason}")
    return _variant_class()()


def _obstacle(layer: nn.Module, adapter: str) -> str:
    """Why an adapter is not suited; "" where it is."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.variants import DoraLinearVariant

    if not isinstance(layer, Linear) or type(layer).forward is not Linear.forward:  # FSDP2 makes subclasses
        return "expected the forward of peft.tuners.lora.layer.Linear"
    variant, base = layer.lora_variant.get(adapter), layer.get_base_layer()
    if type(variant) is not DoraLinearVariant:
        return f"expected DoRA, got {'plain LoRA' if variant is None else type(variant).__name__}"
    if not isinstance(base, nn.Linear) or type(base.weight) not in (nn.Parameter, Tensor, DTensor):
        return f"expected a plain nn.Linear beneath, got {type(base).__name__} with a weight of {type(base.weight).__name__}"
    if layer.fan_in_fan_out:
        return "its weight is transposed (fan_in_fan_out)"
    if layer.ephemeral_gpu_offload:
        return "its weight is moved to a GPU and back (ephemeral_gpu_offload)"
    tensors = base.weight, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.lora_magnitude_vector[adapter].weight
    dtypes = {tensor.dtype for tensor in tensors}
    return "" if dtypes <= set(DTYPES) else f"expected fp32, bf16, fp16 or fp64, got {', '.join(sorted(map(str, dtypes)))}"


def __getattr__(name: str) -> type:
    if name != "FactoredDoraVariant":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _variant_class()


@cache
def _variant_class() -> type:
    from peft.tuners.lora.variants import DoraLinearVariant

    class FactoredDoraVariant(DoraLinearVariant):
        def __init__(self) -> None:
            self.norm = RowNorm()

        def forward(self, module: nn.Module, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
            if reason := _out_of_reach(module, active_adapter):
                _log_once(f"DoRA is computed by PEFT: {reason}")
                return DoraLinearVariant.forward(module, active_adapter, x, result, **kwargs)
            return _forward(self.norm, module, active_adapter, x, result)

    FactoredDoraVariant.__qualname__ = "FactoredDoraVariant"  # where a pickle of an instance finds it
    return FactoredDoraVariant


def _forward(row_norm: Callable[..., Tensor], layer: nn.Module, adapter: str, x: Tensor, result: Tensor) -> Tensor:
    """As PEFT's: x [..., in], the layer's output so far [..., out] -> [..., out]. With dropout, what DoRA adds sees it as a whole."""
    base, dropout, scaling = layer.get_base_layer(), layer.lora_dropout[adapter], layer.scaling[adapter]
    a, b, magnitude = layer.lora_A[adapter], layer.lora_B[adapter].weight, layer.lora_magnitude_vector[adapter].weight
    norm = row_norm(base.weight, a.weight, b, scaling, layer.training)
    if isinstance(dropout, nn.Identity) or not layer.training:
        return ops.dora_combine(result, a(x), b, magnitude, norm, base.bias, scaling=scaling)
    x = dropout(x)
    seen = F.linear(x.to(base.weight.dtype), base.weight)
    return result - seen + ops.dora_combine(seen, a(x), b, magnitude, norm, scaling=scaling)


def _out_of_reach(layer: nn.Module, adapter: str) -> str:
    """Why parameters cannot be read here and now, as when a module of their own gathers them for its own forward; "" where they can."""
    used = layer.get_base_layer(), layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_magnitude_vector[adapter]
    for module in used:
        if not isinstance(module.weight, Tensor) or isinstance(module.weight, DTensor) or module.weight.is_meta:
            return f"{type(module).__name__} holds its weight elsewhere than in this layer's forward"
    for module in used[2:]:  # those that are not called
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"hooks on {type(module).__name__} expect it to be called"
    shapes = [tuple(module.weight.shape) for module in used]
    out, width, rank = layer.out_features, layer.in_features, layer.r[adapter]
    return "" if shapes == [(out, width), (rank, width), (out, rank), (out,)] else f"its weights are of shapes {shapes}"


@cache
def _log_once(message: str) -> None:
    logger.warning(message)
