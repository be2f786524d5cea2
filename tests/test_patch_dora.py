"""PEFT's DoRA layers with this engine's variant in place of PEFT's own: the same in everything but time and memory."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import peft.helpers
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from idefics2_fast import ops, row_norm
from idefics2_fast.patching import dora
from idefics2_fast.patching.dora import Unsupported, dora_variant
from idefics2_fast.row_norm import OptimizerSteps

RANKS = [8, 16, 64, 128]
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def steps():
    counter = OptimizerSteps()
    yield counter
    counter.remove()


class Net(nn.Module):
    def __init__(self, bias: bool = True, width: int = 40, out: int = 48) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, out, bias=bias), nn.Linear(out, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


def wrapped(base: nn.Module | None = None, *, seed: int = 0, **config) -> PeftModel:
    """PEFT's model, with adapters as after some training: B differs from 0, and the magnitude from the norm."""
    torch.manual_seed(seed)
    settings = {"r": 8, "lora_alpha": 12, "use_dora": True, "target_modules": ["first", "second"], "init_lora_weights": False}
    return disturbed(get_peft_model(base or Net(), LoraConfig(**settings | config)))


def disturbed(model: PeftModel) -> PeftModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return model


def dora_layers(model: nn.Module) -> list[PeftLinear]:
    return [module for module in model.modules() if isinstance(module, PeftLinear)]


def patched(model: PeftModel) -> PeftModel:
    """A copy whose DoRA layers compute by `dora_variant`."""
    return patch(copy.deepcopy(model))


def patch(model: PeftModel) -> PeftModel:
    for layer in dora_layers(model):
        for adapter, variant in layer.lora_variant.items():
            if type(variant) is DoraLinearVariant:
                layer.lora_variant[adapter] = dora_variant(layer, adapter)
    return model


def inputs(*rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(rows or (3, 7)), 40, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def results(model: nn.Module, call=None, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The output, and the gradients of x and of all parameters that are trained. Dropout draws what it draws for everybody."""
    x = inputs(dtype=dtype)
    model.zero_grad()
    torch.manual_seed(2)
    y = (call or model)(x)
    (y.float() * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"y": y.detach(), "grad x": x.grad} | {name: grad.clone() for name, grad in gradients.items() if grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert actual.keys() == expected.keys()
    errors = {name: ((actual[name] - value).norm() / value.norm().clamp_min(1e-30)).item() for name, value in expected.items()}
    assert max(errors.values()) <= tolerance, errors


# --- equality ---


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", RANKS)
def test_output_and_gradients_are_pefts(rank, bias, dropout):
    model = wrapped(Net(bias), r=rank, lora_dropout=dropout)
    ours = patched(model)
    assert_same(results(ours), results(model))
    assert_same(results(ours), results(model))  # with the norms that were kept
    model.eval()
    ours.eval()
    assert_same(results(ours), results(model))


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"first": 3}, "alpha_pattern": {"second": 5}},
        {"init_lora_weights": True},
        {"bias": "all"},
        {"bias": "all", "lora_dropout": 0.2},
        {"modules_to_save": ["second"], "target_modules": ["first"]},
    ],
    ids=str,
)
def test_other_configurations_are_pefts(config):
    model = wrapped(**config)
    assert_same(results(patched(model)), results(model))


def test_the_base_weight_may_be_trained():
    model = wrapped()
    for layer in dora_layers(model):
        layer.base_layer.requires_grad_(True)
    assert_same(results(patched(model)), results(model))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_several_active_adapters(dropout):
    model = wrapped(lora_dropout=dropout)
    config = model.peft_config["default"]
    for name, changes in {"more": {"r": 4}, "plain": {"use_dora": False}}.items():
        other = copy.deepcopy(config)
        for key, value in changes.items():
            setattr(other, key, value)
        model.add_adapter(name, other)
    model.base_model.set_adapter(["default", "plain", "more"])
    assert_same(results(patched(model)), results(model))


def test_half_precision_beneath_adapters_in_fp32():
    """PEFT's default: adapters of a bf16 model are fp32."""
    model = wrapped(Net().bfloat16())
    assert dora_layers(model)[0].lora_A["default"].weight.dtype == torch.float32
    for dropout in (0.0, 0.3):
        for layer in dora_layers(model):
            layer.lora_dropout["default"] = nn.Dropout(dropout) if dropout else nn.Identity()
        ours, theirs = (results(each, dtype=torch.bfloat16) for each in (patched(model), model))
        assert ours["y"].dtype == theirs["y"].dtype
        assert_same(ours, theirs, tolerance=2**-7)  # of bf16's 8 bits, once in the base product under dropout and once in each output


def test_autocast():
    model = wrapped()

    def call(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    exact = results(model)
    ours, theirs = (results(each, partial(call, each)) for each in (patched(model), model))
    assert ours["y"].dtype == theirs["y"].dtype
    for name, value in exact.items():
        assert (ours[name] - value).norm() <= 2 * (theirs[name] - value).norm(), name


# --- training ---


def train(model: PeftModel, batches: int = 4, optimizer=torch.optim.AdamW) -> PeftModel:
    optimizer = optimizer([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.02)
    for batch in range(batches):
        for part in range(2):  # accumulated
            torch.manual_seed(100 * batch + part)
            model(torch.randn(5, 40)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_goes_as_with_peft(dropout):
    model = wrapped(lora_dropout=dropout)
    ours = train(patched(model))
    train(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.eval()(inputs()), model.eval()(inputs()))


def test_norms_are_computed_once_per_step(monkeypatch):
    computed, norm = [], ops.dora_norm
    monkeypatch.setattr(ops, "dora_norm", lambda *args: computed.append(1) or norm(*args))
    train(patched(wrapped()), batches=3)
    assert len(computed) == 3 * 2  # for two layers


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = wrapped(lora_dropout=0.3)
    ours = patched(model)
    assert_same(results(ours, partial(checkpoint, ours, use_reentrant=reentrant)), results(model))


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_compiles_without_a_break(dropout):
    ours = patched(wrapped(lora_dropout=dropout))
    for layer in dora_layers(ours):
        x = torch.randn(6, layer.in_features)
        torch.manual_seed(0)
        expected = layer(x)
        torch.manual_seed(0)
        actual = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(actual, expected)
        actual.sum().backward()
    torch.compiler.reset()


# --- what PEFT does with its layers ---


@pytest.mark.parametrize("safe", [False, True])
def test_merging_and_unmerging(safe):
    model = wrapped()
    ours = patched(model)
    expected = model(inputs())
    for each in (model, ours):
        each.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(ours(inputs()), model(inputs()), rtol=0, atol=0)
    torch.testing.assert_close(ours(inputs()), expected)
    for each in (model, ours):
        each.unmerge_adapter()
    assert_same(results(ours), results(model))
    torch.testing.assert_close(ours.merge_and_unload()(inputs()), expected)


def test_disabled_adapters():
    model = wrapped()
    ours = patched(model)
    with ours.disable_adapter(), model.disable_adapter():
        torch.testing.assert_close(ours(inputs()), model(inputs()), rtol=0, atol=0)
    assert_same(results(ours), results(model))


def test_scaled_adapters():
    model = wrapped()
    ours = patched(model)
    with peft.helpers.rescale_adapter_scale(ours, 0.5), peft.helpers.rescale_adapter_scale(model, 0.5):
        assert_same(results(ours), results(model))
    assert_same(results(ours), results(model))


def test_adapters_mixed_in_a_batch_are_refused_as_by_peft():
    ours = patched(wrapped()).eval()
    with pytest.raises(ValueError, match="adapter_names"):
        ours(inputs(), adapter_names=["default"] * 3)
    model = wrapped()
    lora = copy.deepcopy(model.peft_config["default"])
    lora.use_dora = False
    model.add_adapter("plain", lora)
    names = ["plain", "__base__", "plain"]
    torch.testing.assert_close(patched(model).eval()(inputs(), adapter_names=names), model.eval()(inputs(), adapter_names=names))


def test_pefts_caching_in_evaluation():
    model = wrapped()
    ours = patched(model)
    with peft.helpers.DoraCaching():
        for _ in range(2):
            for each in (ours, model):
                each.eval()
            torch.testing.assert_close(ours(inputs()), model(inputs()))
            for each in (ours, model):
                train(each.train(), batches=1)
    torch.testing.assert_close(ours.eval()(inputs()), model.eval()(inputs()))


def test_state_and_checkpoints_are_pefts(tmp_path):
    model = wrapped()
    ours = patched(model)
    assert ours.state_dict().keys() == model.state_dict().keys()
    ours.save_pretrained(tmp_path)
    other = patched(wrapped(seed=5))
    other(inputs())
    base = copy.deepcopy(model).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded(inputs()), model(inputs()))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(inputs()), model(inputs()))


def test_an_adapter_that_comes_and_one_that_goes():
    ours = patched(wrapped())
    ours.add_adapter("late", copy.deepcopy(ours.peft_config["default"]))
    ours.set_adapter("late")
    model = copy.deepcopy(ours)
    for layer in dora_layers(ours):
        layer.lora_variant["late"] = dora_variant(layer, "late")
    assert_same(results(ours), results(model))
    ours.delete_adapter("default")
    assert_same(results(ours), results(model))


def test_copies_and_pickles():
    ours = patched(wrapped())
    expected = results(ours)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same(results(twin), expected, 0)
        variants = [layer.lora_variant["default"] for layer in dora_layers(twin)]
        assert {type(variant) for variant in variants} == {dora.FactoredDoraVariant}
        assert all(variant is not layer.lora_variant["default"] for variant, layer in zip(variants, dora_layers(ours), strict=True))
        train(twin)
    assert_same(results(ours), expected, 0)


# --- what is left to PEFT ---


def unsuited(case: str) -> PeftLinear | nn.Module:
    if case == "Embedding":
        config = LoraConfig(use_dora=True, target_modules=["0"])
        return get_peft_model(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)), config).base_model.model[0]
    model = wrapped(use_dora=case != "plain LoRA")
    layer = dora_layers(model)[0]
    match case:
        case "fan_in_fan_out":
            layer.fan_in_fan_out = True
        case "ephemeral_gpu_offload":
            layer.ephemeral_gpu_offload = True
        case "float8":
            layer.base_layer.weight.data = layer.base_layer.weight.data.to(torch.float8_e4m3fn)
        case "Quantised":
            layer.base_layer.weight = type("Quantised", (nn.Parameter,), {})(layer.base_layer.weight.data, requires_grad=False)
        case "patched twice":
            layer.lora_variant["default"] = dora_variant(layer, "default")
    return layer


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("Embedding", "expected the forward of peft.tuners.lora.layer.Linear"),
        ("plain LoRA", "expected DoRA, got plain LoRA"),
        ("fan_in_fan_out", "transposed"),
        ("ephemeral_gpu_offload", "ephemeral_gpu_offload"),
        ("float8", "got torch.float32, torch.float8_e4m3fn"),
        ("Quantised", "a weight of Quantised"),
        ("patched twice", "expected DoRA, got FactoredDoraVariant"),
    ],
)
def test_unsuited_layers_are_refused_with_a_reason(case, reason):
    with pytest.raises(Unsupported, match=reason):
        dora_variant(unsuited(case), "default")


def test_where_parameters_are_out_of_reach_peft_computes_and_it_is_said(caplog):
    model = wrapped()
    ours = patched(model)
    dora._log_once.cache_clear()
    called = []
    for layer in dora_layers(ours):
        layer.lora_B["default"].register_forward_hook(lambda *args: called.append(args))
    with caplog.at_level(logging.WARNING):
        assert_same(results(ours), results(model), 0)
        results(ours)
    assert called
    assert [record.message for record in caplog.records] == ["DoRA is computed by PEFT: hooks on Linear expect it to be called"]


# --- several processes ---


def batch(step: int) -> Tensor:
    return torch.randn(8, 40, generator=torch.Generator().manual_seed(step))


def three_steps(model: nn.Module, rows: slice) -> nn.Module:
    """Each step sees the batch's `rows`; gradients are the mean over the ranks. Returns what three steps made of the model."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)
    for step in range(3):
        model(batch(step)[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def changed(model: nn.Module) -> Tensor:
    """Outputs after a write, as when a checkpoint is loaded, that leaves no trace in the tensors that FSDP2 gathers."""
    model.eval()(batch(9))
    with torch.no_grad():
        for parameter in model.parameters():
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).mul_(1.25)
    return model(batch(9)).detach()


def one_of_two(rank: int, folder: Path) -> None:
    """What a process does: three steps of its rows, patched before its parameters are sharded, and after."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    steps = OptimizerSteps()
    for order in ORDERS:
        model = patched(wrapped()) if order == "patched, sharded" else wrapped()
        for layer in dora_layers(model):
            fully_shard(layer)
        fully_shard(model)
        model = patch(model) if order == "sharded, patched" else model
        three_steps(model, slice(4 * rank, 4 * rank + 4))
        made = {name: value.full_tensor() for name, value in model.state_dict().items()} | {"changed": changed(model)}
        if rank == 0:
            save_file(made, folder / order)
    steps.remove()
    torch.distributed.destroy_process_group()


ORDERS = ["patched, sharded", "sharded, patched"]


@pytest.mark.slow
def test_two_ranks_with_sharded_parameters_train_as_one(tmp_path):
    command = [sys.executable, __file__, str(tmp_path)]
    ranks = [subprocess.Popen([*command, rank], stderr=subprocess.PIPE, text=True) for rank in "01"]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert "computed by PEFT" not in "".join(errors)
    for model in (patched(wrapped()), wrapped()):  # this engine's, and PEFT's own
        alone = dict(three_steps(model, slice(None)).state_dict())
        alone = {name: value.clone() for name, value in alone.items()} | {"changed": changed(model)}
        for order in ORDERS:
            sharded = load_file(tmp_path / order)
            assert sharded.keys() == alone.keys()
            for name, value in alone.items():
                torch.testing.assert_close(sharded[name], value, rtol=1e-4, atol=1e-5)


# --- faults that make no sound ---


def faulty(fault: str, layer: PeftLinear, active_adapter: str, x: Tensor, result: Tensor, **_) -> Tensor:
    """PEFT's forward with one thing wrong."""
    base, scaling = layer.get_base_layer(), layer.scaling[active_adapter]
    parts = layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
    a, b, magnitude = (part[active_adapter].weight for part in parts)
    norm = torch.linalg.vector_norm(base.weight + (1.0 if fault == "scaling left out of the norm" else scaling) * b @ a, dim=1)
    norm = norm if fault == "gradient through the norm" else norm.detach()
    gain = (magnitude.detach() if fault == "magnitude without gradient" else magnitude) / norm
    dropped = layer.lora_dropout[active_adapter](x)
    seen = x if fault == "dropout on the adapter alone" else dropped
    y = result + (gain - 1) * F.linear(seen, base.weight) + gain * scaling * F.linear(F.linear(dropped, a), b)
    return y + (gain - 1) * base.bias if fault == "bias scaled" else y


FAULTS = [
    "scaling left out of the norm",
    "gradient through the norm",
    "magnitude without gradient",
    "bias scaled",
    "dropout on the adapter alone",
]


@pytest.mark.parametrize("fault", [*FAULTS, "none"])
def test_the_comparison_sees(fault, monkeypatch):
    model = wrapped(lora_dropout=0.3)
    ours = patched(model)
    monkeypatch.setattr(dora, "_forward", lambda norm, layer, adapter, x, result: faulty(fault, layer, adapter, x, result))
    if fault == "none":
        assert_same(results(ours), results(model))
        return
    with pytest.raises(AssertionError):
        assert_same(results(ours), results(model), 1e-3)


def test_the_comparison_sees_norms_that_are_never_computed_anew(monkeypatch):
    model = wrapped()
    monkeypatch.setattr(row_norm, "_state", lambda tensors, key: 0)
    ours = train(patched(model))
    with pytest.raises(AssertionError):
        assert_same(results(ours), results(train(model)), 1e-3)


if __name__ == "__main__":
    one_of_two(int(sys.argv[2]), Path(sys.argv[1]))
