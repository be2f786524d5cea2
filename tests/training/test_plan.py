"""Plans against what a trainer of the same recipe holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support import steps
from support.live_memory import LiveMemory
from support.steps import CONFIG, batch_of, document, packed, trainer_of
from torch.utils.flop_counter import FlopCounterMode

from idefics2_fast import Idefics2Config, ops
from idefics2_fast.training.parallel import Ranks, ranks
from idefics2_fast.training.plan import CARD, count_trained, plan, too_large
from idefics2_fast.training.recipe import Recipe

RECIPES = [
    {},
    {"adapter": "lora", "trained": ()},
    {"targets": ("text",), "trained": ("vision", "head")},
    {"targets": ("connector",), "trained": (), "dropout": 0.0},
    {"adapter": "full", "dropout": 0.0},
    {"dtype": "bfloat16"},
]


@pytest.fixture(scope="module")
def group() -> Iterator[Ranks]:
    with ranks() as group:
        yield group


def nbytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("changes", RECIPES, ids=str)
def test_weights_gradients_and_moments_are_the_trainers_to_the_byte(group, changes):
    trainer = trainer_of(group, **changes)
    planned, trained = plan(CONFIG, trainer.recipe), count_trained(CONFIG, trainer.recipe)
    assert sum(p.numel() for p in trainer.replicated) == trained.magnitudes
    assert nbytes(trainer.parameters) == planned.masters == 4 * trained.total
    assert nbytes(p for p in trainer.model.parameters() if not p.requires_grad) == planned.frozen
    trainer.accumulate(packed([document(9, 3, patches=5), document(14, 8)]), 0)
    assert nbytes(p.grad for p in trainer.parameters) == planned.gradients
    trainer.update(0)
    moments = [state[name] for state in trainer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert nbytes(moments) == planned.moments


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter": "lora"},
        {"dropout": 0.0},
        {"adapter": "lora", "dropout": 0.0},
        {"targets": ("text",)},
        {"targets": ("text",), "trained": ()},
        {"targets": ("text",), "trained": ("vision",)},
        {"adapter": "full", "dropout": 0.0},
    ],
    ids=str,
)
def test_activations_are_those_that_autograd_keeps(group, changes):
    """Without checkpointing every kept tensor passes autograd's hooks; 3 % for single values a row and the head's rows.

    In fp32 alone: in half precision a CPU keeps copies that a GPU does not make.
    """
    tokens, patches = 401, 307  # no width of the model
    trainer = trainer_of(group, **{"checkpointing": "none", "tokens": tokens, "patches": patches} | changes)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if {tokens, patches} & set(tensor.shape):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = batch_of([document(tokens - 6, 20, patches=patches)])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = trainer._loss(batch, 0)
    found = sum(kept.values())
    del loss
    assert found == pytest.approx(plan(CONFIG, trainer.recipe).activations, rel=0.03)


DEEP = replace(CONFIG, text=replace(CONFIG.text, num_hidden_layers=8), vision=replace(CONFIG.vision, num_hidden_layers=8))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize("changes", [{}, {"adapter": "full", "dropout": 0.0}, {"targets": ("text",), "trained": ()}], ids=str)
def test_activations_are_the_peak_of_a_step(group, monkeypatch, changes, how):
    """Of what is alive at one time in forward and backward pass, recomputation and all."""
    tokens, patches = 401, 307  # no width of the model
    monkeypatch.setattr(steps, "CONFIG", DEEP)
    trainer = trainer_of(group, **{"checkpointing": how, "tokens": tokens, "patches": patches} | changes)
    batch = batch_of([document(tokens - 6, 20, patches=patches)])
    with LiveMemory({tokens, patches}) as memory:
        trainer.accumulate([batch], 0)
    planned = plan(DEEP, trainer.recipe)
    assert memory.peak == pytest.approx(planned.activations + planned.working, rel=0.10)


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": "full"},
        {},
        {"targets": ("text",), "trained": ()},
        {"targets": ("text",), "trained": ("connector",)},
        {"targets": ("text",), "trained": ("new_tokens",)},
    ],
    ids=str,
)
def test_flops_are_those_that_torch_counts(group, changes):
    """12 %: adapters of rank 1 on a width of 64 add 5 %, 9 % where q, k, v share a product, and what masks hide is counted.

    torch has no formula for attention on a CPU: its reference's products are counted.
    """
    trainer = trainer_of(group, **{"checkpointing": "none", "rank": 1, "dropout": 0.0} | changes)
    batch = batch_of([document(40, 30, patches=307), *(document(40, 30, seed=seed) for seed in range(8))])  # little that a mask hides
    reference = ops.using(segment_attention="reference", perceiver_attention="reference")
    with reference, FlopCounterMode(display=False) as counter:
        losses = trainer.accumulate([batch], 0)
    assert losses.flops == pytest.approx(counter.get_total_flops(), rel=0.12)


def test_gpus_share_what_is_sharded_and_no_more():
    recipe = Recipe(packs=16)
    one, eight = (plan(Idefics2Config.named("idefics2-8b"), recipe, gpus) for gpus in (1, 8))
    assert eight.frozen == one.frozen / 8
    assert one.masters / 8 < eight.masters < one.masters / 7
    assert (eight.activations, eight.gathered, eight.flops) == (one.activations, one.gathered, one.flops)
    assert one.seconds(8, 0.5) == one.flops / (8 * 989e12 * 0.5)
    with pytest.raises(ValueError, match="packs = 16"):
        plan(CONFIG, recipe, 3)


def test_dora_of_the_8b_model_fits_one_card_and_full_training_does_not():
    config = Idefics2Config.named("idefics2-8b")
    recipe = Recipe()
    assert too_large(plan(config, recipe), recipe, 1) == ""
    full = replace(recipe, adapter="full", dropout=0.0)
    assert plan(config, full).memory > CARD
    assert "moments" in too_large(plan(config, full), full, 1)
    long = replace(recipe, checkpointing="none", tokens=16384)
    assert "checkpointing full" in too_large(plan(config, long), long, 1)


def test_a_trained_weight_costs_a_third_pass():
    config = CONFIG
    lora, full = Recipe(trained=()), Recipe(adapter="full", dropout=0.0)
    assert plan(config, full).flops == 1.5 * plan(config, lora).flops
