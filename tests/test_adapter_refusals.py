"""Adapters that are refused: a line that names the mistake, and a model that is as it was."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from idefics2_fast import Idefics2, Idefics2Config
from idefics2_fast.adapter_files import load_adapters, save_adapters
from idefics2_fast.adapters import attach_adapters, merge_adapters, unmerge_adapters, use_adapter

Q = "base_model.model.model.text_model.layers.0.self_attn.q_proj"
LATENTS = "base_model.model.model.connector.perceiver_resampler.latents"
NORM = "base_model.model.model.text_model.norm.weight"


@pytest.fixture(scope="module")
def model() -> Idefics2:
    torch.manual_seed(0)
    return Idefics2(Idefics2Config.named("tiny")).eval()


@pytest.fixture(scope="module")
def good(model: Idefics2, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors of an adapter that is taken."""
    folder, other = tmp_path_factory.mktemp("good"), copy.deepcopy(model)
    attach_adapters(other, rank=2, targets=("text",))
    for trained in (other.connector.perceiver_resampler.latents, other.text_model.norm.weight):
        trained.requires_grad_(True).data.mul_(1.5)
    save_adapters(other, folder)
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def state(model: Idefics2) -> tuple[dict[str, Tensor], tuple]:
    """All that a refusal must leave alone."""
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modules = [(name, id(module), type(module), module.training) for name, module in model.named_modules()]
    choice = list(model.choice.names), model.choice.usual, dict(model.choice.brought), model.kept
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, (grads, modules, choice)


def assert_unchanged(model: Idefics2, before: tuple[dict[str, Tensor], tuple]) -> None:
    tensors, rest = state(model)
    assert rest == before[1]
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in tensors.items())


def write(folder: Path, config: object, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


def raw(folder: Path, content: bytes) -> None:
    (folder / "adapter_model.safetensors").write_bytes(content)


def header(size: int | None = None, **entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text


IN_CONFIG = {
    "r: text": ({"r": "2"}, "r = '2', expected 1 or more"),
    "r: zero": ({"r": 0}, "r = 0"),
    "r: true": ({"r": True}, "r = True"),
    "r: another": ({"r": 3}, r"has \[2, 64\] for .*expected \[3, 64\] by r"),
    "r: huge": ({"r": 10**40}, "r = 1000"),
    "alpha: not a number": ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
    "alpha: huge": ({"lora_alpha": 10**400}, "lora_alpha = 1000"),
    "alpha: a list": ({"lora_alpha": [1]}, "lora_alpha"),
    "dora: text": ({"use_dora": "yes"}, "use_dora = 'yes', expected true or false"),
    "dora: off": ({"use_dora": False}, "lora_magnitude_vector and .* more tensors that are not"),
    "rank pattern": ({"rank_pattern": {"q_proj": 1}}, "rank_pattern"),
    "rank pattern: a list": ({"rank_pattern": [1]}, "rank_pattern"),
    "alpha pattern: text": ({"alpha_pattern": {"q_proj": "1"}}, "alpha_pattern"),
    "a pattern that is none": ({"alpha_pattern": {"(q_proj": 1}}, r"'\(q_proj' in alpha_pattern, which is no pattern"),
    "a pattern without end": ({"alpha_pattern": {"((.*)+)+X": 1}}, "none of a group"),
    "a slow pattern": ({"target_modules": "(.*a|.*b).*.*.*.*.*.*X"}, "6 repetitions"),
    "modules that are not targeted": ({"target_modules": ["k_proj"]}, "which adapter_config.json does not target"),
    "layers that are not": ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, "does not target"),
    "excluded modules": ({"exclude_modules": ["q_proj"]}, "does not target"),
    "targets: a number": ({"target_modules": 3}, "target_modules = 3"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
    "PiSSA, faster": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "init_lora_weights"),
    "an initialisation: a number": ({"init_lora_weights": 1}, "init_lora_weights"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "KaSA": ({"kasa_config": {"beta": 1}}, "kasa_config"),
    "replicated layers": ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
    "parameters as targets": ({"target_parameters": ["latents"]}, "target_parameters"),
    "a field of tomorrow": ({"use_new_formula": True}, "use_new_formula = True"),
    "another method": ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
    "another method's fields": ({"alpha": 8, "peft_type": "LOKR"}, "peft_type = 'LOKR', expected 'LORA'"),
    "no number for alpha": ({"lora_alpha": None}, "lora_alpha = None, expected a finite number"),
    "no method": ({"peft_type": None}, "no peft_type"),
    "biases that are not there": ({"bias": "all"}, "bias = 'all', expected .*bias in adapter_model"),
    "biases: text": ({"bias": "some"}, "bias = 'some'"),
    "B's bias with DoRA": ({"lora_bias": True}, "lora_bias and use_dora"),
    "modules that are not there": ({"modules_to_save": ["lm_head"]}, "'lm_head' in modules_to_save"),
    "modules: text": ({"modules_to_save": "connector"}, "modules_to_save"),
    "tokens without rows": ({"trainable_token_indices": [3]}, "has nothing for .*trainable_tokens_delta"),
    "tokens of another table": ({"trainable_token_indices": {"q_proj": [3]}}, "expected embed_tokens or lm_head"),
    "tokens twice": ({"trainable_token_indices": [3, 3]}, "different ids below 32003"),
    "tokens outside": ({"trainable_token_indices": [32003]}, "different ids below 32003"),
    "tokens: negative": ({"trainable_token_indices": [-1]}, "ids of tokens"),
}


@pytest.mark.parametrize("kind", IN_CONFIG)
def test_load_adapters_refused_config(kind, model, good, tmp_path):
    change, message = IN_CONFIG[kind]
    config, tensors = good
    write(tmp_path, config | change, tensors)
    refused(model, tmp_path, message)


def refused(model: Idefics2, folder: Path, message: str, name: str | None = None) -> None:
    before = state(model)
    with pytest.raises(ValueError, match=message) as raised:
        load_adapters(model, folder, name=name)
    assert "\n" not in str(raised.value)
    assert_unchanged(model, before)


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, tensor)


IN_TENSORS = {
    "no A": (without(f"{Q}.lora_A.weight"), r"has nothing for .*q_proj.lora_A.weight, expected \[2, 64\]"),
    "no B": (without(f"{Q}.lora_B.weight"), "has nothing for .*q_proj.lora_B.weight"),
    "no magnitude": (without(f"{Q}.lora_magnitude_vector"), "has nothing for .*q_proj.lora_magnitude_vector"),
    "another B": (put(f"{Q}.lora_B.weight", torch.zeros(65, 2)), r"has \[65, 2\] for"),
    "a flat A": (put(f"{Q}.lora_A.weight", torch.zeros(128)), r"has \[128\] for"),
    "whole numbers": (put(f"{Q}.lora_B.weight", torch.zeros(64, 2, dtype=torch.int64)), "is I64, expected one of F64, F32"),
    "not a number": (put(f"{Q}.lora_B.weight", torch.full((64, 2), float("nan"))), "not finite"),
    "an infinite weight": (put(NORM, torch.full((64,), float("inf"))), "not finite"),
    "another weight": (put(LATENTS, torch.zeros(1, 64)), "more tensors that are not this model's|expected"),
    "more": (put("base_model.model.model.extra", torch.zeros(1)), "model.extra and 0 more tensors that are not this model's"),
    "another layer": (put(f"{Q.replace('.0.', '.99.')}.lora_A.weight", torch.zeros(2, 64)), "layers.99.* which this model does not adapt"),
    "the same twice": (put(NORM.replace("norm.", "norm.base_layer."), torch.zeros(64)), "expected one of them"),
    "no adapter": (lambda tensors: [tensors.pop(name) for name in list(tensors) if "lora" in name], "no adapter"),
    "nothing": (dict.clear, "no adapter"),
}


@pytest.mark.parametrize("kind", IN_TENSORS)
def test_load_adapters_refused_tensors(kind, model, good, tmp_path):
    change, message = IN_TENSORS[kind]
    config, tensors = good
    tensors = dict(tensors)
    change(tensors)
    write(tmp_path, config, tensors)
    refused(model, tmp_path, message)


IN_FILES = {
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter at"),
    "a pickle": (lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"), "never read"),
    "an empty file": (lambda folder: raw(folder, b""), "truncated or not safetensors"),
    "cut": (lambda folder: raw(folder, (folder / "adapter_model.safetensors").read_bytes()[:-5]), "truncated"),
    "a tail": (lambda folder: raw(folder, (folder / "adapter_model.safetensors").read_bytes() + b"x"), "tail"),
    "an endless header": (lambda folder: raw(folder, header(2**62)), "a header of 4611686018427387904 bytes, expected 16777216"),
    "a header that is none": (lambda folder: raw(folder, struct.pack("<Q", 4) + b"{{{{"), "damaged JSON"),
    "a header of depth": (lambda folder: raw(folder, struct.pack("<Q", 10**5) + b"[" * 10**5), "damaged JSON|cannot be read"),
    "a tensor beyond": (lambda folder: raw(folder, header(x={"dtype": "F32", "shape": [9], "data_offsets": [0, 36]})), "truncated"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter at"),
    "a config that is none": (lambda folder: (folder / "adapter_config.json").write_text("{"), "damaged JSON"),
    "a config of bytes": (lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff\xfe"), "damaged JSON"),
    "a config of depth": (lambda folder: (folder / "adapter_config.json").write_text("[" * 10**5), "damaged JSON"),
    "a config with a field twice": (
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "r": 4}'),
        "the key 'r' occurs twice",
    ),
    "a config that is a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "expected an object, found list"),
}


@pytest.mark.parametrize("kind", IN_FILES)
def test_load_adapters_refused_files(kind, model, good, tmp_path):
    damage, message = IN_FILES[kind]
    write(tmp_path, *good)
    damage(tmp_path)
    refused(model, tmp_path, message)


@pytest.mark.parametrize("name", ["keys", "train", "values", "", "a.b", "_modules", 5])
def test_adapters_refused_names(name, model, good, tmp_path):
    write(tmp_path, *good)
    refused(model, tmp_path, "an adapter's name is", name)
    before = state(model)
    with pytest.raises(ValueError, match="an adapter's name is"):
        attach_adapters(model, name=name, rank=2)
    assert_unchanged(model, before)


def test_adapters_refused_beside_another(model, good, tmp_path):
    """A second one that brings other weights; calls that ask for one that is not there."""
    config, tensors = good
    write(tmp_path, config, tensors)
    carrying = copy.deepcopy(model)
    load_adapters(carrying, tmp_path, name="user/fr")
    assert carrying.choice.usual == "user/fr"
    write(tmp_path, config, tensors | {NORM: tensors[NORM] + 1})
    refused(carrying, tmp_path, "norm.weight of its own, expected that of user/fr", "de")
    before = state(carrying)
    for call in (
        lambda: use_adapter(carrying, "de"),
        lambda: merge_adapters(carrying, "de"),
        lambda: merge_adapters(carrying),
        lambda: unmerge_adapters(carrying),
        lambda: attach_adapters(carrying, rank=2),
        lambda: attach_adapters(carrying, name="de", targets=()),
        lambda: attach_adapters(carrying, name="de", alpha=float("nan")),
        lambda: attach_adapters(carrying, name="de", dropout=1.0),
        lambda: save_adapters(carrying, tmp_path / "other", name="de"),
    ):
        with pytest.raises(ValueError, match="expected|carries|merge"):
            call()
        assert_unchanged(carrying, before)
    assert not (tmp_path / "other").exists()


# --- random folders ---

VALUES = [
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    2.5,
    1e308,
    float("inf"),
    10**30,
    "",
    "x",
    "q_proj",
    ".*q_proj",
    "(",
    "all-linear",
    [],
    ["q_proj"],
]
VALUES += [[1], [[]], {}, {"q_proj": 1}, {"q_proj": "x"}, {".*": 2}, {"(": 1}, {"embed_tokens": [1]}, "lora_only", "pissa", "\ud800"]


def damaged(chance: random.Random, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    """A folder with up to two changes of each of one or two kinds: config, tensors, bytes."""
    config, tensors = dict(config), dict(tensors)
    kinds = chance.choices(["config", "tensors", "bytes"], k=2)
    for _ in range(chance.randrange(3) * ("config" in kinds)):
        config[chance.choice([*config, "another"])] = chance.choice(VALUES)
    for _ in range(chance.randrange(3) * ("tensors" in kinds)):
        name = chance.choice(sorted(tensors))
        tensor = tensors.pop(name)
        cut = tensor[: chance.randrange(len(tensor) + 1)].contiguous()
        made = chance.choice([None, cut, tensor.half(), tensor.double(), tensor.long(), tensor * float("nan"), tensor.flatten(), tensor])
        if made is not None:
            cuts = name.split(".")
            tensors[chance.choice([name, ".".join(cuts[1:]), ".".join(cuts[:-1]), name + "x", chance.choice(sorted(tensors))])] = made
    write(folder, config, tensors)
    if "bytes" in kinds:
        file = folder / chance.choice(["adapter_config.json", "adapter_model.safetensors"])
        content = bytearray(file.read_bytes())
        for _ in range(chance.randrange(3)):
            content[min(int(chance.expovariate(0.002)), len(content) - 1)] = chance.randrange(256)
        file.write_bytes(content[: chance.choice([len(content)] * 3 + [chance.randrange(len(content))])])


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_load_adapters_random_folders(count, model, good, tmp_path):
    """ValueError or success, and nothing changed after a refusal."""
    chance, taken = random.Random(count), 0
    own = copy.deepcopy(model)
    before = state(own)
    for _ in range(count):
        damaged(chance, *good, tmp_path)
        try:
            load_adapters(own, tmp_path)
        except ValueError:
            assert_unchanged(own, before)
        else:
            taken += 1
            own = copy.deepcopy(model)
            before = state(own)
    assert 0.1 * count < taken < 0.9 * count
