"""The engine's adapters against PEFT's, on the same weights and the same inputs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from support.hf import engine_of, sample, to_batch, to_hf
from torch import nn

from idefics2_fast import Batch, Idefics2, Idefics2Config
from idefics2_fast.adapter_files import load_adapters, save_adapters
from idefics2_fast.adapters import (
    AdaptedLinear,
    Dropout,
    adapted,
    attach_adapters,
    merge_adapters,
    refresh_norms,
    unmerge_adapters,
    use_adapter,
)
from idefics2_fast.benchmarks.local_checkpoint import random_model
from idefics2_fast.layers import Linear

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


@pytest.mark.parametrize("write", [lambda model, other: model.load_state_dict(other.state_dict()), lambda model, _: in_place(model)])
def test_refresh_norms_and_weights_written_later(write):
    """Norms that are kept are of weights that are still there: other weights are loaded, or somebody's optimizer writes them."""
    model, other = base_model(), base_model()
    for seed, one in enumerate((model, other)):
        moved(one, None, seed, rank=4)
    refresh_norms(model)
    write(model, other)
    fresh = base_model()
    attach_adapters(fresh, rank=4, alpha=6)
    fresh.load_state_dict(model.state_dict())
    _, (batch, *_) = documents(None)
    with torch.no_grad():
        assert torch.equal(model(batch), fresh(batch))


def in_place(model: Idefics2) -> None:
    with torch.no_grad():
        for layer in adapted(model).values():
            layer.b.add_(0.5)


# --- several on one base ---

EVERYWHERE = ("vision", "connector", "text", "head")
KINDS = {"fr": {"rank": 4, "targets": EVERYWHERE}, "de": {"rank": 2, "dora": False, "targets": ("text", "vision")}}


def base_model() -> Idefics2:
    torch.manual_seed(0)
    return Idefics2(CONFIG).eval()


def moved(model: Idefics2, name: str | None, seed: int, **kind) -> None:
    """An adapter as after some training."""
    attach_adapters(model, name=name, alpha=6, **kind)
    draw = torch.Generator().manual_seed(seed)
    for place, layer in adapted(model).items():
        if name is None or place.endswith(f".{name}"):
            layer.b.data.normal_(std=0.1, generator=draw)
            if layer.magnitude is not None:
                layer.magnitude.data.mul_(1 + 0.2 * torch.randn(layer.magnitude.shape, generator=draw))


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> tuple[Idefics2, dict[str | None, Idefics2]]:
    """A model with two named adapters, and models that carry nothing but one of them, or none, read from a folder."""
    model, folder = base_model(), tmp_path_factory.mktemp("adapters")
    alone = {None: base_model()}
    for seed, (name, kind) in enumerate(KINDS.items()):
        moved(model, name, seed, **kind)
        model.requires_grad_(False)
        save_adapters(model, folder / name, name=name)
        load_adapters(alone.setdefault(name, base_model()), folder / name)
    return model, alone


def documents(*names: str | None, text: int = 6, pictures: bool = True) -> tuple[Batch, list[Batch]]:
    """Documents with images of different sizes and without, in one batch and each in one of its own; the last tokens are trained."""
    sizes = [[(392, 420)], [], [(378, 392), (420, 378)], [(378, 378)]]
    samples = [sample(sizes[index] if pictures else [], CONFIG, text=text + index, seed=index) for index in range(len(names))]
    labels = [[-100] * (len(s.tokens) - 4) + s.tokens[-4:] for s in samples]
    packed = replace(to_batch(samples, CONFIG, labels=labels), adapters=names)
    return packed, [to_batch([s], CONFIG, labels=[own]) for s, own in zip(samples, labels, strict=True)]


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * expected.abs().max().item() + 1e-7)


@pytest.mark.parametrize("names", [("fr", "de", None), ("de", "fr", "fr", "de")])
def test_documents_with_adapters_of_their_own_give_what_each_gives_alone(several, names):
    model, alone = several
    packed, each = documents(*names)
    with torch.no_grad():
        actual = model(packed).split(packed.documents.lengths)
        expected = [alone[name](batch) for name, batch in zip(names, each, strict=True)]
        for ours, theirs in zip(actual, expected, strict=True):
            near(ours, theirs)
        assert (expected[0] - alone[None](each[0])).abs().max() > 0.01, "the adapters change something"


def test_documents_longer_than_a_block_of_rows(several):
    """Without gradients row-wise work runs in blocks of 512 rows, whose borders are not the documents'."""
    model, alone = several
    names = ("fr", "de", "fr")
    packed, each = documents(*names, text=399, pictures=False)
    assert packed.documents.total > 1024
    with torch.no_grad():
        for ours, name, batch in zip(model.hidden(packed).split(packed.documents.lengths), names, each, strict=True):
            near(ours, alone[name].hidden(batch))


def trained_gradients(model: Idefics2, batch: Batch, end: str = "") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The summed loss, and the gradients of one adapter, by the names that they have in a model with no other."""
    model.zero_grad()
    total, count = model.loss_sum(batch)
    assert count == 4 * len(batch.documents)
    total.backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return total.detach(), {name.replace(end, ""): grad for name, grad in named.items() if end in name}


def test_loss_and_gradients_of_a_mixed_batch_are_those_of_its_documents(several):
    model, alone = several
    names = ("fr", "de", "fr", None)
    packed, each = documents(*names)
    for one in (model, *alone.values()):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(name.endswith((".a", ".b", ".magnitude")))
    try:
        total, expected, checked = 0, {"fr": {}, "de": {}}, 0
        for name, batch in zip(names, each, strict=True):
            if name is None:
                total += alone[name].loss_sum(batch)[0]
                continue
            loss, grads = trained_gradients(alone[name], batch)
            total += loss
            for place, grad in grads.items():
                expected[name][place] = expected[name].get(place, 0) + grad
        for name, theirs in expected.items():
            loss, ours = trained_gradients(model, packed, f".adapters.{name}")
            near(loss, total)
            assert ours.keys() == theirs.keys()
            for place, grad in theirs.items():
                torch.testing.assert_close(ours[place], grad, rtol=0, atol=1e-4 * grad.abs().max().item() + 1e-7, msg=place)
                checked += 1
        assert checked > 100
    finally:
        for one in (model, *alone.values()):
            one.requires_grad_(False)


def test_served_unmerged_each_document_is_continued_as_by_its_own_model(several):
    """Greedy, with documents that end at different steps."""
    model, alone = several
    names = ("fr", None, "de", "fr")
    packed, each = documents(*names)
    expected = [alone[name].generate(batch, max_new_tokens=6, stop_tokens=[]).tokens[0] for name, batch in zip(names, each, strict=True)]
    stop = [expected[0][2]]
    ended = [tokens[: tokens.index(stop[0]) + 1] if stop[0] in tokens else tokens for tokens in expected]
    assert model.generate(packed, max_new_tokens=6, stop_tokens=[]).tokens == expected
    assert model.generate(packed, max_new_tokens=6, stop_tokens=stop).tokens == ended
    assert len({tuple(tokens) for tokens in expected}) > 1


def test_generating_derives_norms_once_and_forgets_them(several, monkeypatch):
    model, _ = several
    packed, _ = documents("fr", "de", pictures=False)
    derived = []
    norm = AdaptedLinear._norm
    monkeypatch.setattr(AdaptedLinear, "_norm", lambda layer: derived.append(layer.norm is None) or norm(layer))
    model.generate(packed, max_new_tokens=3, stop_tokens=[])
    with_magnitude = [layer for layer in adapted(model).values() if layer.magnitude is not None]
    assert sum(derived) == len(with_magnitude) > 10
    assert all(layer.norm is None for layer in with_magnitude)


def test_the_usual_adapter_is_that_of_batches_that_do_not_say(several):
    model, alone = several
    _, (batch, *_) = documents("fr")
    with torch.no_grad():
        for name in ("fr", None, "de"):
            use_adapter(model, name)
            near(model(batch), alone[name](batch))
        near(model(replace(batch, adapters=("fr",))), alone["fr"](batch))
        near(model(batch), alone["de"](batch))


def test_an_adapter_trains_beside_another_that_is_frozen():
    model = base_model()
    moved(model, "fr", 0, rank=2)
    attach_adapters(model, name="de", rank=2)
    refresh_norms(model)
    packed, _ = documents("fr", "de", pictures=False)
    _, grads = trained_gradients(model, packed)
    assert grads
    assert all(".adapters.de." in name for name in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [None, "fr"])
def test_unmerging_gives_the_bits_back(dtype, name):
    model = base_model().to(dtype)
    moved(model, name, 0, rank=4, targets=EVERYWHERE)
    if name is not None:
        moved(model, "de", 1, rank=2)
        use_adapter(model, name)
    _, (batch, *_) = documents(None)
    weights = {place: weight.clone() for place, weight in model.hf_tensors().items()}
    with torch.no_grad():
        before = model(batch)
        merge_adapters(model, name, keep=True)
        assert not adapted(model)
        assert isinstance(model.lm_head, Linear)
        merged = model(batch)
        assert not torch.equal(merged, before)
        torch.testing.assert_close(
            merged.float(), before.float(), rtol=0, atol=(2e-5 if dtype == torch.float32 else 0.1) * before.abs().max().item()
        )
        unmerge_adapters(model)
        assert torch.equal(model(batch), before)
    assert all(torch.equal(weight, weights[place]) for place, weight in model.hf_tensors().items())
    with pytest.raises(ValueError, match="nothing to unmerge"):
        unmerge_adapters(model)


@pytest.mark.parametrize("targets", [("text",), ("vision", "head")])
def test_merge_adapters_beyond_fp16(targets):
    """Refused by the layer's name, and the model is as it was."""
    model = base_model().to(torch.float16)
    moved(model, None, 0, rank=1, dora=False, targets=targets)
    last = [*adapted(model).values()][-1]
    last.b.data.fill_(1e7)
    before = {place: weight.clone() for place, weight in model.hf_tensors().items()}
    with pytest.raises(ValueError, match=r"would have a weight of .* merged, expected 65504 at most in fp16"):
        merge_adapters(model)
    assert adapted(model)
    assert all(torch.equal(weight, before[place]) for place, weight in model.hf_tensors().items())


@pytest.mark.parametrize("name", [None, "fr"])
def test_save_pretrained_beneath_adapters(name, tmp_path):
    """The format of a whole model has no place for them: they are not left out in silence."""
    model = base_model()
    attach_adapters(model, name=name, rank=1)
    with pytest.raises(ValueError, match=rf"carries adapters \({name or 'one without a name'}\), expected none: merge_adapters first"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    merge_adapters(model, name)
    model.save_pretrained(tmp_path / "model")


# --- dropout ---


class Dropped(nn.Module):
    """PEFT's dropout replaced by the engine's numbers."""

    def __init__(self, dropout: Dropout) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(x, "text", 0)


def beside_peft(rule: str, dora: bool, bias: bool) -> list[list[torch.Tensor]]:
    """Output and gradients (x, A, B, magnitude) of the engine's layer and of PEFT's, in training, the same numbers dropped."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base, dropout = Linear(12, 20, bias=bias).double(), Dropout(0.4, seed=1, rule=rule)
    for parameter in base.parameters():
        parameter.data.normal_()
    theirs = nn.Sequential(nn.Linear(12, 20, bias=bias).double())
    theirs[0].load_state_dict(base.state_dict())
    wrapped = get_peft_model(
        theirs, LoraConfig(r=3, lora_alpha=6, use_dora=dora, lora_dropout=0.4, target_modules=["0"]), autocast_adapter_dtype=False
    )
    peft = wrapped.base_model.model[0].double().train()
    peft.lora_dropout["default"] = Dropped(dropout)
    ours = AdaptedLinear(base.requires_grad_(False), [20], 3, 2.0, dora, dropout, ("text", 0)).double().train()
    ours.b.data.normal_()
    pairs = [(ours.a, peft.lora_A["default"].weight), (ours.b, peft.lora_B["default"].weight)]
    if dora:
        ours.magnitude.data.mul_(1.3)
        pairs.append((ours.magnitude, peft.lora_magnitude_vector["default"].weight))
    results = []
    for layer, leaves in ((ours, [mine for mine, _ in pairs]), (peft, [other for _, other in pairs])):
        for mine, other in pairs:
            other.data.copy_(mine.data)
        x = torch.randn(7, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *leaves])])
    return results


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dora", [True, False])
def test_pefts_rule_of_dropout(dora, bias):
    """Output and every gradient are PEFT's, value by value; under the other rule they are with LoRA, and not with DoRA."""
    for ours, theirs in zip(*beside_peft("peft", dora, bias), strict=True):
        torch.testing.assert_close(ours, theirs.to(ours), rtol=0, atol=1e-6 * theirs.abs().max().item())
    ours, theirs = (results[0] for results in beside_peft("branch", dora, bias))
    assert ((ours - theirs).abs().max() < 1e-6) == (not dora)


def test_both_rules_mean_the_same_without_dropout():
    """The mean over many draws is the output without dropout: what is dropped is made up for."""
    torch.manual_seed(0)
    base = Linear(12, 20)
    for parameter in base.parameters():
        parameter.data.normal_()
    x = torch.randn(1, 12).repeat(40000, 1)
    for rule in ("branch", "peft"):
        layer = AdaptedLinear(base.requires_grad_(False), [20], 3, 2.0, True, Dropout(0.3, rule=rule), ("text", 0))
        layer.b.data.normal_(std=0.3)
        layer.magnitude.data.mul_(1.2)
        with torch.no_grad():
            expected, drawn = layer.eval()(x[:1]), layer.train()(x)
        assert ((drawn.mean(0) - expected[0]).abs() <= 5 * drawn.std(0) / 200).all()
        assert (drawn.std(0) > 0.1).all()


@pytest.mark.parametrize("rule", ["branch", "peft"])
def test_what_a_document_drops_does_not_depend_on_its_neighbours_adapter(rule):
    model = base_model()
    for name in ("fr", "de"):
        moved(model, name, 0, rank=2, targets=("text",), dropout=0.5, dropout_rule=rule)
    model.train()
    packed, _ = documents("fr", "de", pictures=False)
    batches = (replace(packed, adapters=names) for names in (("de", "de"), ("fr", "de")))
    alone, beside = (model.hidden(batch).split(packed.documents.lengths)[1] for batch in batches)
    near(beside, alone)
    assert (model.eval().hidden(packed).split(packed.documents.lengths)[1] - alone).abs().max() > 0.01


def test_a_rule_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="dropout_rule is 'base', expected one of branch, peft"):
        attach_adapters(base_model(), dropout_rule="base")


def test_a_rank_below_one_is_named():
    with pytest.raises(ValueError, match="rank is 0, expected 1 or more"):
        attach_adapters(base_model(), rank=0)


def test_mistakes_with_names_are_named(tmp_path):
    model = base_model()
    packed, (batch, *_) = documents("fr", "it", pictures=False)
    with pytest.raises(ValueError, match="asks for adapter 'fr', the model carries none with a name"):
        model(packed)
    moved(model, "fr", 0, rank=2, targets=("text",))
    for name, message in (
        (None, "merge_adapters first, or name each"),
        ("fr", "another name than 'fr'"),
        ("v1.2", "without dots"),
        ("", "''"),
    ):
        with pytest.raises(ValueError, match=message):
            attach_adapters(model, name=name)
    with pytest.raises(ValueError, match="asks for adapter 'it', the model carries fr"):
        model(packed)
    for call in (lambda: save_adapters(model, tmp_path), lambda: merge_adapters(model), lambda: use_adapter(model, "it")):
        with pytest.raises(ValueError, match="expected one of the model's adapters: fr"):
            call()
    with pytest.raises(ValueError, match="2 adapters for 1 documents"):
        replace(batch, adapters=("fr", "fr"))
    merge_adapters(model, "fr", keep=True)
    with pytest.raises(ValueError, match="unmerge_adapters first"):
        attach_adapters(model)


def test_adapters_with_weights_of_their_own_share_them(tmp_path):
    """Weights trained whole are the base's: a second adapter may bring the same, and no others."""
    model = base_model()
    for name, factor in (("fr", 1.5), ("de", 1.0), ("it", 2.0)):
        other = base_model()
        attach_adapters(other, rank=2, targets=("text",))
        other.connector.perceiver_resampler.latents.requires_grad_(True).data.mul_(1.5 if name == "de" else factor)
        save_adapters(other, tmp_path / name)
    for name in ("fr", "de"):
        load_adapters(model, tmp_path / name, name=name)
    assert torch.equal(model.connector.perceiver_resampler.latents, base_model().connector.perceiver_resampler.latents * 1.5)
    with pytest.raises(ValueError, match="latents of its own, expected that of fr, de"):
        load_adapters(model, tmp_path / "it", name="it")


# --- mistakes ---


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
