"""Adapters on disk: whatever PEFT computes from a folder the engine computes, and the reverse; nothing is lost on the way."""

from __future__ import annotations

import copy
import errno
import json
import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from support.hf import engine_of, sample, to_batch, to_hf
from torch import nn

from idefics2_fast import Idefics2, Idefics2Config, adapter_files
from idefics2_fast.adapter_config import HARMLESS, READ, REFUSED
from idefics2_fast.adapter_files import load_adapters, save_adapters
from idefics2_fast.adapters import adapted, attach_adapters, merge_adapters, unmerge_adapters
from idefics2_fast.benchmarks.local_checkpoint import random_model

CONFIG = Idefics2Config.named("tiny")
SAMPLES = [sample([(56, 70)], CONFIG), sample([], CONFIG, seed=1)]
PADDED, PACKED = to_hf(SAMPLES), to_batch(SAMPLES, CONFIG)
TEXT = r".*text_model.*\.(q_proj|v_proj|gate_proj|down_proj)"
BOTH = rf"({TEXT}|.*vision_model.*\.(q_proj|k_proj|fc1))"
TOKENS = sorted({SAMPLES[0].tokens[1], SAMPLES[1].tokens[2], 7})

# What PEFT can say, by field: each of these changes logits.
FORMULAS = {
    "rank_pattern": {"rank_pattern": {"q_proj": 2, r"layers.0.*fc1": 6}, "target_modules": BOTH},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 11, "text_model.layers.1.mlp.gate_proj": 3}, "target_modules": BOTH},
    "both patterns, DoRA": {"rank_pattern": {"k_proj": 1}, "alpha_pattern": {"k_proj": 7}, "use_dora": True, "target_modules": BOTH},
    "the first pattern that fits": {"alpha_pattern": {"q_proj|v_proj": 1, "q_proj": 90}, "target_modules": TEXT},
    "rank-stabilised, with patterns": {
        "use_rslora": True,
        "rank_pattern": {"v_proj": 9},
        "alpha_pattern": {"v_proj": 2},
        "target_modules": TEXT,
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding, DoRA": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True, "rank_pattern": {"embed_tokens": 2}},
    "embedding alone": {"target_modules": r".*embed_tokens"},
    "rows of the embedding": {"trainable_token_indices": TOKENS, "target_modules": TEXT},
    "rows of embedding and head": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [5, 6]}, "target_modules": TEXT},
    "biases of the layers": {"bias": "lora_only", "target_modules": BOTH},
    "all biases, DoRA": {"bias": "all", "use_dora": True, "target_modules": BOTH},
    "a bias of B": {"lora_bias": True, "target_modules": rf"({BOTH}|.*modality_projection.*up_proj)"},
    "layers, and modules that are not": {
        "layers_to_transform": [1],
        "layers_pattern": "layers",
        "exclude_modules": ["v_proj"],
        "target_modules": ["q_proj", "v_proj"],
    },
    "a module by its whole name, in another layer": {
        "layers_to_transform": [1],
        "target_modules": ["model.text_model.layers.0.self_attn.q_proj", "v_proj"],
    },
    "modules by the end of their names": {"modules_to_save": ["head", "text_model.norm"], "target_modules": TEXT},
    "fan in, fan out": {"fan_in_fan_out": True, "target_modules": ["q_proj", "embed_tokens"]},
    "modules trained whole": {"modules_to_save": ["connector", "lm_head", "embed_tokens", "layer_norm1"], "target_modules": TEXT},
    "every linear layer": {"target_modules": "all-linear", "use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian", "target_modules": TEXT},
    "orthogonal": {"init_lora_weights": "orthogonal", "target_modules": TEXT},
}


@pytest.fixture(scope="module")
def hugging_face() -> nn.Module:
    return random_model(CONFIG).eval()


def trained(hf: nn.Module, config: dict[str, object], folder: Path) -> torch.Tensor:
    """An adapter of PEFT as after some training, in its folder; its logits as PEFT reads it anew."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(hf), LoraConfig(**{"r": 4, "lora_alpha": 6} | config))
    draw = torch.Generator().manual_seed(3)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        size = 0.1 * max(parameter.detach().abs().mean().item(), 0.3)
        parameter.data.add_(torch.randn(parameter.shape, generator=draw) * size)
    model.save_pretrained(folder)
    return read_by_peft(hf, folder)


@torch.no_grad()
def read_by_peft(hf: nn.Module, folder: Path) -> torch.Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(copy.deepcopy(hf), folder).eval()
    return model(**PADDED).logits[PADDED["attention_mask"].bool()]


def engine(hf: nn.Module) -> Idefics2:
    return engine_of(hf, CONFIG)


@torch.no_grad()
def logits(model: Idefics2) -> torch.Tensor:
    return model(PACKED)


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


# Those that between them take every path run each time.
QUICK = ("both patterns, DoRA", "embedding, DoRA", "rows of embedding and head")


@pytest.mark.parametrize("formula", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FORMULAS])
def test_load_adapters_formula(formula, hugging_face, tmp_path):
    """The engine's logits are PEFT's; so are those of both, of what the engine saves again; merged and taken apart as well."""
    expected = trained(hugging_face, FORMULAS[formula], tmp_path / "peft")
    ours = engine(hugging_face)
    assert (expected - logits(ours)).abs().max() > 0.01 * expected.abs().max(), "the adapter changes something"
    load_adapters(ours, tmp_path / "peft")
    near(logits(ours), expected)
    save_adapters(ours, tmp_path / "ours")
    near(read_by_peft(hugging_face, tmp_path / "ours"), expected)
    again = engine(hugging_face)
    load_adapters(again, tmp_path / "ours", name="fr")
    near(logits(again), expected)
    if formula != "a bias of B":
        merge_adapters(ours, keep=True)
        near(logits(ours), expected)
        unmerge_adapters(ours)
        near(logits(ours), expected)


def test_adapter_config_fields_are_pefts():
    """Each field of the installed LoraConfig is classified, with PEFT's own default: a new one turns this red."""
    from peft import LoraConfig

    known, default = {field.name for field in fields(LoraConfig)}, LoraConfig()
    assert known == READ.keys() | HARMLESS.keys() | REFUSED.keys()
    assert len(known) == len(READ) + len(HARMLESS) + len(REFUSED)
    assert all(getattr(default, name) == off for name, off in REFUSED.items())
    assert all(getattr(default, name) == off for name, (off, _, _) in READ.items() if name != "peft_type")


# Weights trained beside an adapter, by the ends of the engine's names; the adapter is on the text, or on the connector as well.
BESIDE = {
    "latents": (("text",), ["perceiver_resampler.latents"]),
    "latents, beside adapters": (("text", "connector"), ["perceiver_resampler.latents", "input_context_norm.weight"]),
    "the connector": (("text",), ["connector"]),
    "a weight without its bias": (("text",), ["vision_model.layers.0.layer_norm1.weight", "vision_model.layers.1.mlp.fc1.weight"]),
    "a bias": (("vision",), ["vision_model.layers.0.self_attn.out_proj.base.bias"]),
    "beneath adapters": (("vision", "head"), ["vision_model.layers.1.self_attn.qkv_proj.base.weight", "lm_head.base.weight"]),
    "tables": (("text",), ["embed_tokens.weight", "position_embedding.weight"]),
}


@pytest.mark.parametrize("name", [None, "fr"])
@pytest.mark.parametrize("beside", [name if name == "latents" else pytest.param(name, marks=pytest.mark.slow) for name in BESIDE])
def test_save_adapters_weights_trained_beside(beside, name, hugging_face, tmp_path):
    """PEFT reads each of them; they outlive any number of loads and saves."""
    targets, places = BESIDE[beside]
    ours = engine(hugging_face)
    attach_adapters(ours, name=name, rank=2, targets=targets)
    draw = torch.Generator().manual_seed(2)
    for place, parameter in ours.named_parameters():
        if any(end in place for end in places):
            parameter.requires_grad_(True)
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    expected = logits(ours)
    assert (expected - logits(engine(hugging_face))).abs().max() > 1e-3
    for number in range(2):
        save_adapters(ours, tmp_path / str(number), name=name)
        near(read_by_peft(hugging_face, tmp_path / str(number)), expected)
        ours = engine(hugging_face)
        load_adapters(ours, tmp_path / str(number), name=name)
        near(logits(ours), expected)
    first, second = ((tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in "01")
    assert first == second


@pytest.mark.slow
def test_save_adapters_part_of_a_fused_layer(hugging_face, tmp_path):
    """One projection with an adapter, another trained whole: the file of the engine speaks of these two alone."""
    config = {"target_modules": r".*text_model.*q_proj", "use_dora": True, "modules_to_save": ["text_model.layers.0.self_attn.v_proj"]}
    expected = trained(hugging_face, config, tmp_path / "peft")
    ours = engine(hugging_face)
    load_adapters(ours, tmp_path / "peft")
    save_adapters(ours, tmp_path / "ours")
    near(read_by_peft(hugging_face, tmp_path / "ours"), expected)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert len(written["target_modules"]) == CONFIG.text.num_hidden_layers
    assert written["modules_to_save"] == ["model.text_model.layers.0.self_attn.v_proj"]
    for layer in adapted(ours).values():
        layer.b.data.add_(0.1)
    trained_on = logits(ours)
    save_adapters(ours, tmp_path / "on")
    near(read_by_peft(hugging_face, tmp_path / "on"), trained_on)


@pytest.mark.parametrize("fails", ["save_file", "fsync"])
def test_save_adapters_on_a_full_disk(tmp_path, monkeypatch, fails):
    """The adapter that was there stands, to the byte, and nothing is beside it."""
    ours = Idefics2(CONFIG)
    attach_adapters(ours, rank=2, targets=["connector"])
    save_adapters(ours, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for layer in adapted(ours).values():
        layer.b.data.add_(1.0)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((adapter_files, "save_file") if fails == "save_file" else (os, "fsync")), full)
    with pytest.raises(OSError, match="No space left"):
        save_adapters(ours, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
