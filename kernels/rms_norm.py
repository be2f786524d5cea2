"""RMSNorm.

    y = x / sqrt(mean(x^2) + eps) * w,   the mean over the last axis, in fp32 whatever the input's dtype

On a CPU the mean comes from one `vector_norm` pass: torch's own composite makes six, and ten times as many in bf16.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula in the inputs' dtype (fp64 included): x [T, C], weight [C] -> [T, C]."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same with the mean, and for half precision all the arithmetic, in fp32; rounded once."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    y = wide * rstd(wide, eps)
    y = y * weight if torch.is_grad_enabled() else y.mul_(weight)
    return y if wide is x else y.to(x.dtype)


def rstd(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), fp32 (fp64 for fp64) [T, 1]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    if torch.compiler.is_compiling():
        return (norm.square() / x.shape[-1] + eps).rsqrt()
    return torch.addcmul(_constant(eps, dtype, x.device), norm, norm, value=1 / x.shape[-1]).rsqrt()


@functools.cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in inference mode could not take part in a backward pass later
        return torch.tensor(value, dtype=dtype, device=device)
