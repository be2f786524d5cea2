"""Keys and values of the perceiver's context, of all layers at once.

    y = rms(x)^-1 * (x W^T),   rms(x) = sqrt(mean(x^2) + eps) of every row of x

The layers' context norms see the same x and differ in their weights w alone, so that norm_w(x) W_kv^T = rms(x)^-1 * x (W_kv * w)^T: with
the norm weights folded into W, one product serves all layers, and the norm is a scale of its rows.

Legend: P context rows, C their width, K output columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from idefics2_fast.kernels import rms_norm


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula in the inputs' dtype (fp64 included): the rows are normalised, then multiplied. Shapes as in `folded`."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() @ weight.T


def folded(x: Tensor, weight: Tensor, eps: float, linear: Callable[[Tensor, Tensor], Tensor] = F.linear) -> Tensor:
    """The same with the norm as a scale of the product's rows: no normalised copy of x.

    Args:
        x: [P, C].
        weight: [K, C], each layer's rows times its norm's weight.
        linear: multiplies.

    Returns:
        [P, K] in x's dtype.
    """
    y, scale = linear(x, weight), rms_norm.rstd(x, eps)
    return (y * scale).to(x.dtype) if torch.is_grad_enabled() or scale.dtype != y.dtype else y.mul_(scale)
