"""The check that kernels' suites share: outputs and gradients against what is right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def off_by(actual: Sequence[Tensor], expected: Sequence[Tensor], allowed: float, *, order: float = 2) -> str:
    """What is wrong with tensors, each by the norm of its error over its own: the largest of them, in words; "" where it is allowed.

    A NaN or an infinity anywhere is never allowed.

    Args:
        order: of the norm; `inf` for the largest value.
    """

    def norm(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, order)

    errors = [(norm(left.to(right.dtype) - right) / norm(right)).item() for left, right in zip(actual, expected, strict=True)]
    worst = torch.tensor(errors).max().item()  # Python's max forgets a NaN that does not come first
    return "" if worst <= allowed else f"off by {worst:.1e}, {allowed:.1e} is allowed"
