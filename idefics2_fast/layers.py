"""The pieces that vision tower, connector and language model share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idefics2_fast import ops

# Rows of row-wise work done at a time without gradients: 512 x 14336 fp32 is 28 MiB, near a CPU's last-level cache.
ROWS = 512


class Linear(nn.Linear):
    """nn.Linear whose product goes through `ops.linear`. Input [T, in], output [T, out]."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def reset_parameters(self) -> None:
        """Nothing: the model draws its weights itself, or reads them."""


class Embedding(nn.Embedding):
    """nn.Embedding without weights of its own making, through `ops.embedding`: features may take some rows' place, noise may be added."""

    def forward(
        self, ids: Tensor, features: Tensor | None = None, feature_rows: Tensor | None = None, noise: ops.Noise | None = None
    ) -> Tensor:
        return ops.embedding(ids, self.weight, features, feature_rows, noise, padding_idx=self.padding_idx)

    def reset_parameters(self) -> None:
        """Nothing: the model draws its weights itself, or reads them."""


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis of [T, C], its mean in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up as the upper and lower rows of one matrix."""

    def __init__(self, hidden: int, intermediate: int, output: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden, 2 * intermediate, bias=False)
        self.down_proj = Linear(intermediate, output, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        if torch.is_grad_enabled():
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(F.silu(gate).mul_(up))


def add(residual: Tensor, branch: Tensor) -> Tensor:
    """residual + branch; without gradients in the residual's own memory, which must belong to the caller."""
    return residual + branch if torch.is_grad_enabled() else residual.add_(branch)


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) for a function that treats every row alone. Without gradients on a CPU, in blocks of rows that stay in cache."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.shape[0] <= ROWS:
        return function(x)
    first = function(x[:ROWS])
    out = first.new_empty(x.shape[0], *first.shape[1:])
    out[:ROWS] = first
    for start in range(ROWS, x.shape[0], ROWS):
        out[start : start + ROWS] = function(x[start : start + ROWS])
    return out
