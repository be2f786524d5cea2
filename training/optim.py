"""AdamW as the recipe wants it: which weights decay, how the rate moves, how the gradient is clipped."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from idefics2_fast.training.recipe import Recipe


def adamw(named: Iterable[tuple[str, nn.Parameter]], recipe: Recipe, by_rows: Collection[nn.Parameter] = ()) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained: matrices decay, biases, norms, magnitudes and latents do not (the authors' groups).

    Args:
        by_rows: matrices of which some rows alone are trained; they do not decay, for all rows would.
    """
    rowwise = {id(parameter) for parameter in by_rows}
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    if not trained:
        raise ValueError(f"the recipe trains no parameter: targets {recipe.targets!r}, trained {recipe.trained!r}")
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}  # the fused step takes sharded weights or whole ones, not both
    for name, parameter in trained:
        key = decays(name, parameter) and id(parameter) not in rowwise, isinstance(parameter, DTensor)
        groups.setdefault(key, []).append(parameter)
    settings = [{"params": members, "weight_decay": recipe.weight_decay if decay else 0.0} for (decay, _), members in groups.items()]
    return torch.optim.AdamW(settings, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, and not to the latents."""
    return parameter.ndim > 1 and not name.endswith("latents")


def rate(recipe: Recipe, step: int) -> float:
    """Learning rate of step 0, 1, ...: a linear warm-up, then constant, or down to zero after the last step along a line or a cosine."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    gone = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    factor = {"constant": 1.0, "linear": 1 - gone, "cosine": (1 + math.cos(math.pi * gone)) / 2}[recipe.schedule]
    return recipe.learning_rate * factor


def set_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def clip(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Scales the gradients so that their 2-norm is at most `most`; the norm before, over all ranks' shards. A collective."""
    parameters = [p for p in parameters if p.grad is not None]
    sharded = [p.grad for p in parameters if isinstance(p.grad, DTensor)]
    whole = [p.grad for p in parameters if not isinstance(p.grad, DTensor)]
    norms = [torch.nn.utils.get_total_norm(grads) for grads in (sharded, whole) if grads]
    norm = torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]).norm()
    for grads in filter(None, (sharded, whole)):
        torch._foreach_mul_(grads, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm
