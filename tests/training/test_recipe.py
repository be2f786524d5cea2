"""Recipes: what they refuse, where their values come from, and which of them belong to a run."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from idefics2_fast.training.recipe import PLACES, SOURCES, Recipe, instruct, table


def recipe(**changes) -> Recipe:
    return instruct("model", "data.jsonl", "out", **changes)


def test_every_field_carries_its_source_and_a_default():
    for entry in fields(Recipe):
        assert entry.metadata["source"] in SOURCES, entry.name
    assert Recipe() == Recipe()


def test_the_table_tells_what_was_set_from_where_defaults_come_from():
    lines = {line.split()[0]: line for line in table(recipe(rank=8)).splitlines()}
    assert "set here" in lines["rank"]
    assert "paper" in lines["adapter"]
    assert len(lines) == len(fields(Recipe))


@pytest.mark.parametrize(("name", "hint"), [("learning_rat", "'learning_rate'"), ("neftune", "'neftune_alpha'")])
def test_an_unknown_field_gets_a_hint(name, hint):
    with pytest.raises(ValueError, match=f"{name!r}, did you mean {hint}"):
        recipe(**{name: 1})
    with pytest.raises(ValueError, match="no field 'xyzzy'$"):
        recipe(xyzzy=1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.0}, "rank is 2.0, expected a whole number"),
        ({"rank": True}, "rank is True"),
        ({"learning_rate": "1e-4"}, "learning_rate is '1e-4', expected a finite number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": 0}, "above 0"),
        ({"learning_rate": 10**400}, "expected a finite number"),
        ({"tokens": 2**63}, "tokens is 9223372036854775808, expected less than"),
        ({"warmup": -(2**63)}, "expected less than"),
        ({"adapter": "qlora"}, "one of dora, lora, full"),
        ({"dtype": "float16"}, "one of bfloat16, float32"),
        ({"betas": (0.9,)}, "betas"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"targets": "text"}, "targets is 'text', expected a tuple of str"),
        ({"targets": ("tower",)}, "parts among"),
        ({"targets": ()}, "adapter='dora'"),
        ({"seed": -1}, "seed is -1"),
        ({"dropout": 1.0}, "dropout"),
        ({"split_share": 1.5}, "between 0 and 1"),
        ({"upscale_most": 1.2}, "Triangular"),
        ({"held_out": -1}, "held_out"),
    ],
)
def test_values_that_cannot_be(changes, named):
    with pytest.raises(ValueError, match=named):
        recipe(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"adapter": "full", "dropout": 0.1}, "0 with adapter='full'"),
        ({"warmup": 1000}, "below steps = 1000"),
        ({"trained": ("text",)}, "cannot be trained whole and carry adapters"),
        ({"targets": ("connector",), "trained": ()}, "used themselves"),
        ({"targets": ("vision",), "trained": ("text", "new_tokens")}, "not both new_tokens and text"),
    ],
)
def test_combinations_that_cannot_be(changes, named):
    with pytest.raises(ValueError, match=named):
        recipe(**changes)


def test_combinations_that_can():
    assert recipe(adapter="full").dropout == 0
    assert recipe(warmup=1000, schedule="constant").warmup == 1000
    assert recipe(upscale_share=0, upscale_most=1.0).upscale_most == 1.0
    assert recipe(targets=["text"]).targets == ("text",)


def test_the_digest_knows_what_decides_the_numbers_and_no_place():
    first = recipe()
    others = {"model": "elsewhere", "data": "copy.jsonl", "out": "b", "save_every": 7, "keep": 1, "log_to": ("wandb",), "workers": 9}
    assert set(others) == set(PLACES)
    assert replace(first, **others).digest() == first.digest()
    numbers = {"int": lambda v: v + 1, "float": lambda v: v + 0.125, "bool": lambda v: not v}
    others = {"adapter": "lora", "targets": ("text",), "trained": (), "betas": (0.5, 0.5), "schedule": "cosine", "dtype": "float32"}
    others |= {"checkpointing": "none"}
    for entry in fields(Recipe):
        if entry.name not in PLACES:
            value = others[entry.name] if entry.name in others else numbers[entry.type](entry.default)
            assert replace(first, **{entry.name: value}).digest() != first.digest(), entry.name
