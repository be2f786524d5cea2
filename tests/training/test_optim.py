"""The optimizer: rates against their formulas, which weights decay, clipping against PyTorch's."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from idefics2_fast import Idefics2, Idefics2Config
from idefics2_fast.adapters import attach_adapters
from idefics2_fast.training import optim
from idefics2_fast.training.recipe import Recipe

RECIPE = Recipe(learning_rate=2.0, warmup=4, steps=12)


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("constant", [2.0] * 8),
        ("linear", [2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1 + math.cos(math.pi * step / 8) for step in range(8)]),
    ],
)
def test_rates(schedule, after):
    recipe = replace(RECIPE, schedule=schedule)
    assert [optim.rate(recipe, step) for step in range(12)] == pytest.approx([0.5, 1.0, 1.5, 2.0, *after], abs=1e-12)


def test_without_warm_up_the_first_step_has_the_whole_rate():
    assert optim.rate(replace(RECIPE, warmup=0), 0) == 2.0


def test_matrices_decay_and_biases_norms_magnitudes_latents_do_not():
    tiny = Idefics2Config.named("tiny")
    model = Idefics2(replace(tiny, text=replace(tiny.text, vocab_size=64), image_token_id=1))
    attach_adapters(model, rank=2)
    model.connector.requires_grad_(True)
    names = {id(p): name for name, p in model.named_parameters()}
    decaying, others = optim.adamw(model.named_parameters(), Recipe(weight_decay=0.3)).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    decaying, others = ({names[id(p)] for p in group["params"]} for group in (decaying, others))
    assert all(name.endswith((".a", ".b", "proj.weight", "_proj_fold", "kv_proj.weight")) for name in decaying), decaying
    assert all(name.endswith((".magnitude", "norm.weight", "latents", ".bias")) or "norm" in name for name in others), others
    assert any(name.endswith("latents") for name in others)
    assert len(decaying) + len(others) == sum(p.requires_grad for p in model.parameters())


def test_rows_that_are_not_trained_do_not_decay():
    weight = nn.Parameter(torch.ones(4, 3))
    (group,) = optim.adamw([("lm_head.weight", weight)], Recipe(weight_decay=0.3), by_rows={weight}).param_groups
    assert group["weight_decay"] == 0.0


def test_a_recipe_that_trains_nothing_is_refused():
    with pytest.raises(ValueError, match="trains no parameter"):
        optim.adamw([("weight", nn.Parameter(torch.ones(1), requires_grad=False))], Recipe())


@pytest.mark.parametrize("most", [0.5, 1e6])
def test_clipping_is_pytorchs(most):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((5, 3), (7,))] + [nn.Parameter(torch.zeros(2))]
    for parameter in parameters[:2]:
        parameter.grad = torch.randn_like(parameter)
    expected = [nn.Parameter(p.detach().clone()) for p in parameters[:2]]
    for mine, parameter in zip(expected, parameters, strict=False):
        mine.grad = parameter.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(expected, most)
    assert optim.clip(parameters, most) == norm
    for mine, parameter in zip(expected, parameters, strict=False):
        torch.testing.assert_close(parameter.grad, mine.grad, rtol=1e-6, atol=0)


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([1.0, math.inf])
    assert not math.isfinite(optim.clip([weight], 1.0))
