"""The engine's adapters against PEFT's, on the same weights and the same inputs."""

from __future__ import annotations

import json

import pytest
import torch
from support.hf import engine_of, sample, to_batch, to_hf

from idefics2_fast import Idefics2Config
from idefics2_fast.adapters import adapted, attach_adapters, load_adapters, merge_adapters, refresh_norms, save_adapters
from idefics2_fast.benchmarks.local_checkpoint import random_model

CONFIG = Idefics2Config.named("tiny")
VISION = r".*vision_model.*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
TEXT = r".*text_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
CONNECTOR = r".*connector.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def peft_model(hf, *, dora: bool = True, targets: str = f"({VISION}|{TEXT})", rank: int = 4):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(hf, LoraConfig(r=rank, lora_alpha=6, use_dora=dora, target_modules=targets))
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            factor = 0.1 if "magnitude" not in name else 0.1 * parameter.detach().abs().mean()
            parameter.data.add_(torch.randn(parameter.shape, generator=draw) * factor)
    return model.eval()


def batches():
    samples = [sample([(392, 420)], CONFIG), sample([], CONFIG, seed=1)]
    return to_hf(samples), to_batch(samples, CONFIG)


def logits_of(model, inputs):
    """Of the tokens that are no padding."""
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("targets", [f"({VISION}|{TEXT})", CONNECTOR, r".*text_model.*\.(q_proj|v_proj)", "lm_head"])
def test_an_adapter_of_peft_gives_what_peft_gives(tmp_path, dora, targets):
    hf = random_model(CONFIG)
    engine = engine_of(hf, CONFIG)
    theirs = peft_model(hf, dora=dora, targets=targets)
    theirs.save_pretrained(tmp_path)
    load_adapters(engine, tmp_path)
    padded, packed = batches()
    expected = logits_of(theirs, padded)
    with torch.no_grad():
        torch.testing.assert_close(engine(packed), expected, rtol=0, atol=2e-5 * expected.abs().max().item())
        merge_adapters(engine)
        assert not adapted(engine)
        torch.testing.assert_close(engine(packed), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("dora", [True, False])
def test_peft_reads_what_the_engine_saves(tmp_path, dora):
    from peft import PeftModel

    hf = random_model(CONFIG)
    engine = engine_of(hf, CONFIG)
    attach_adapters(engine, rank=4, alpha=6, dora=dora)
    for parameter in [p for layer in adapted(engine).values() for p in (layer.a, layer.b)]:
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    engine.connector.requires_grad_(True)
    engine.connector.perceiver_resampler.latents.data.mul_(1.5)
    save_adapters(engine, tmp_path)
    padded, packed = batches()
    with torch.no_grad():
        expected = engine(packed)
    theirs = PeftModel.from_pretrained(hf, tmp_path)
    actual = logits_of(theirs, padded)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    other = engine_of(random_model(CONFIG), CONFIG)
    load_adapters(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other(packed), expected)


def test_a_fresh_adapter_changes_no_bit():
    engine = engine_of(random_model(CONFIG), CONFIG)
    _, packed = batches()
    with torch.no_grad():
        before = engine(packed)
        attach_adapters(engine, rank=4, targets=("vision", "connector", "text"))
        torch.testing.assert_close(engine(packed), before, rtol=0, atol=1e-5)


def test_gradients_reach_the_adapters_alone_and_equal_pefts(tmp_path):
    hf = random_model(CONFIG)
    engine = engine_of(hf, CONFIG)
    theirs = peft_model(hf)
    theirs.save_pretrained(tmp_path)
    load_adapters(engine, tmp_path)
    padded, packed = batches()
    rows = padded["attention_mask"].bool()
    weights = torch.randn(int(rows.sum()), 32003, generator=torch.Generator().manual_seed(5))
    (theirs(**padded).logits[rows] * weights).sum().backward()
    (engine(packed) * weights).sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    checked = 0
    for name, layer in adapted(engine).items():
        assert layer.base.weight.grad is None
        views = [hf.removesuffix(".weight") for hf, _ in engine.hf_views(f"{name}.weight", layer.base.weight)]
        for kind, grads in {
            "lora_A.default.weight": layer.a.grad.split(layer.rank),
            "lora_B.default.weight": layer.b.grad.split(layer.rows),
            "lora_magnitude_vector.default.weight": layer.magnitude.grad.split(layer.rows),
        }.items():
            for module, grad in zip(views, grads, strict=True):
                theirs_grad = expected[f"base_model.model.{module}.{kind}"]
                torch.testing.assert_close(grad, theirs_grad, rtol=0, atol=1e-4 * theirs_grad.abs().max().item() + 1e-7)
                checked += 1
    assert checked == 3 * (3 * 6 + 3 * 7)


def test_norms_that_are_kept_change_when_they_are_refreshed():
    engine = engine_of(random_model(CONFIG), CONFIG)
    attach_adapters(engine, rank=4)
    refresh_norms(engine)
    layer = engine.get_submodule("text_model.layers.0.self_attn.qkv_proj")
    kept = layer.norm.clone()
    layer.b.data.normal_()
    assert torch.equal(layer._norm(), kept)
    refresh_norms(engine)
    dense = layer.base.weight + layer.scaling * torch.block_diag(*layer.b.split(layer.rows)) @ layer.a
    torch.testing.assert_close(layer.norm, dense.detach().norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"peft_type": "LOHA"}, "peft_type"), ({"bias": "all"}, "bias"), ({"rank_pattern": {"q_proj": 2}}, "rank_pattern")],
)
def test_an_adapter_of_another_kind_is_refused(tmp_path, change, message):
    hf = random_model(CONFIG)
    peft_model(hf).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_adapters(engine_of(random_model(CONFIG), CONFIG), tmp_path)


def test_mistakes_are_named(tmp_path):
    engine = engine_of(random_model(CONFIG), CONFIG)
    with pytest.raises(ValueError, match="'txt'"):
        attach_adapters(engine, targets=("txt",))
    with pytest.raises(ValueError, match="no adapter at"):
        load_adapters(engine, tmp_path)
    with pytest.raises(ValueError, match="carries no adapters"):
        save_adapters(engine, tmp_path)
    with pytest.raises(ValueError, match="dropout is"):
        attach_adapters(engine, targets=("connector",), dropout=0.1)
    attach_adapters(engine, rank=2)
    with pytest.raises(ValueError, match="carries adapters already"):
        attach_adapters(engine, rank=2)
