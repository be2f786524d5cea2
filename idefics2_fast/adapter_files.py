"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from idefics2_fast.adapters import Dropout, attach, check_name, layers_of, linears, part_of
from idefics2_fast.model import Idefics2

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# config entries that change what an adapter computes, with the only value that the engine has
PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "trainable_token_indices": None,
}


def save_adapters(model: Idefics2, path: str | os.PathLike[str], base: str = "", *, name: str | None = None) -> None:
    """Writes an adapter, and whatever else is trained, as PEFT's `save_pretrained` would.

    Weights that are trained whole stand in PEFT's `modules_to_save`. Sharded weights are gathered: every rank must call, rank 0 writes.

    Args:
        path: the folder; `base`: name or folder of the model they belong to.
        name: the adapter, where they have names.

    Raises:
        ValueError: a model without adapters, or without this one.
    """
    layers = layers_of(model, name)
    tensors, targets = {}, []
    for place, layer in layers.items():
        views = model.hf_views(f"{place}.weight", layer.base.weight)
        for index, (hf, rows) in enumerate(zip([hf for hf, _ in views], accumulate(layer.rows), strict=True)):
            module = hf.removesuffix(".weight")
            targets.append(module)
            own = slice(rows - layer.rows[index], rows)
            tensors[f"{module}.lora_A.weight"] = _whole(layer.a)[index * layer.rank : (index + 1) * layer.rank]
            tensors[f"{module}.lora_B.weight"] = _whole(layer.b)[own]
            if layer.magnitude is not None:
                tensors[f"{module}.lora_magnitude_vector"] = _whole(layer.magnitude)[own]
    trained = {place: _whole(tensor.detach()) for place, tensor in model.named_parameters() if tensor.requires_grad}
    whole = {hf: view for place, tensor in trained.items() for hf, view in model.hf_views(place, tensor)}
    tensors |= whole
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({PREFIX + hf: t.detach().contiguous().cpu() for hf, t in tensors.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
        layer = next(iter(layers.values()))
        config = PLAIN | {
            "base_model_name_or_path": base or None,
            "r": layer.rank,
            "lora_alpha": layer.scaling * layer.rank,
            "lora_dropout": layer.dropout.p,
            "use_dora": layer.magnitude is not None,
            "use_rslora": False,
            "target_modules": targets,
            "modules_to_save": _modules_of(whole) or None,
            "task_type": None,
            "inference_mode": True,
        }
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _modules_of(names: Iterable[str]) -> list[str]:
    """The modules that PEFT is to keep whole: the connector, or the single module that a weight belongs to."""
    return sorted({"connector" if ".connector." in name else name.rpartition(".")[0] for name in names})


@torch.no_grad()
def load_adapters(model: Idefics2, path: str | os.PathLike[str], *, name: str | None = None) -> None:
    """Attaches the adapter of a folder in PEFT's format (LoRA, DoRA), and copies the weights that were trained whole, in place.

    A fused layer of which only some projections have adapters gets neutral ones for the others.

    Args:
        name: of one adapter among several, which becomes the usual one, see `use_adapter`. The base's weights are the same for all: what a
            second one brings must be what the model has.

    Raises:
        ValueError: no such folder, an adapter of another kind, or weights that are not this model's.
    """
    check_name(model, name)
    config, tensors = _read_adapters(Path(path))
    rank, dora = config["r"], bool(config.get("use_dora"))
    scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    targets = {hf.removesuffix(".lora_A.weight") for hf in tensors if hf.endswith(".lora_A.weight")}
    views = {
        place: [hf.removesuffix(".weight") for hf, _ in model.hf_views(f"{place}.weight", linear.weight)]
        for place, linear in linears(model).items()
    }
    chosen = [place for place in views if part_of(place) and targets & set(views[place])]
    unknown = targets - {hf for place in chosen for hf in views[place]}
    if unknown:
        raise ValueError(f"{path} has adapters for {sorted(unknown)[0]} and {len(unknown) - 1} more, which this model does not adapt")
    _load_whole(model, tensors, path)
    attach(model, name, chosen, rank, scaling, dora, Dropout(0.0))
    layers = layers_of(model, name)
    for place in chosen:
        layer = layers[place]
        kinds = {"lora_A.weight": layer.a.split(rank), "lora_B.weight": layer.b.split(layer.rows)}
        if dora:
            kinds["lora_magnitude_vector"] = layer.magnitude.split(layer.rows)
        for kind, parts in kinds.items():
            for hf, part in zip(views[place], parts, strict=True):
                if hf in targets:
                    _copy(part, tensors, f"{hf}.{kind}", path)
    if tensors:
        raise ValueError(f"{path} has {sorted(tensors)[0]} and {len(tensors) - 1} more tensors that are not this model's")


def _load_whole(model: Idefics2, tensors: dict[str, Tensor], path: Any) -> None:
    """Weights that were trained whole become the base's, unless adapters stand on it that were made for its present ones."""
    own = model.hf_tensors()
    for hf in [hf for hf in tensors if hf in own]:
        if model.choice.names and not torch.equal(own[hf], tensors[hf].to(own[hf])):
            raise ValueError(f"{path} has a {hf} of its own, expected that of {', '.join(model.choice.names)}: they share one base")
        _copy(own[hf], tensors, hf, path)


def _copy(target: Tensor, tensors: dict[str, Tensor], name: str, path: Any) -> None:
    tensor = tensors.pop(name, None)
    if tensor is None or tensor.shape != target.shape:
        found = "nothing" if tensor is None else list(tensor.shape)
        raise ValueError(f"{path} has {found} for {name}, expected {list(target.shape)}")
    target.copy_(tensor)


def _read_adapters(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors, by Hugging Face's names of the model."""
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise ValueError(f"no adapter at {folder}: expected {CONFIG_FILE} and {WEIGHTS_FILE}")
    config = json.loads((folder / CONFIG_FILE).read_text())
    for name, plain in PLAIN.items():
        if config.get(name, plain) not in (plain, None):
            raise ValueError(f"{folder / CONFIG_FILE} has {name} = {config[name]!r}, expected {plain!r}")
    tensors = load_file(folder / WEIGHTS_FILE)  # PEFT saves an adapted head's own weights as well, as base_layer
    return config, {name.removeprefix(PREFIX).replace(".base_layer.", "."): tensor for name, tensor in tensors.items()}
