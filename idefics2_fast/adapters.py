"""LoRA and DoRA on the engine's linear layers, in PEFT's format.

    attach_adapters(model, rank=64, alpha=16)      # training: the base is frozen
    save_adapters(model, path)                     # PEFT, the patch and load_adapters read it
    load_adapters(model, path); merge_adapters(model)

The formula stands in `kernels/dora_linear.py`. A layer that the model fuses (q, k, v; k, v; gate, up) carries an adapter for each of its
Hugging Face projections; their A are one product, their B one block-diagonal matrix.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from idefics2_fast import ops
from idefics2_fast.layers import Linear
from idefics2_fast.model import Idefics2
from idefics2_fast.row_norm import RowNorm, block_diagonal

# Parts of a model whose linear layers can carry adapters, and where they are.
PARTS = {"vision": "vision_model.layers.", "connector": "connector.", "text": "text_model.layers.", "head": "lm_head"}

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class Dropout:
    """What the adapters' branches drop: values whose counter-based number falls below p, so that it depends on nothing else.

    Attributes:
        p: the share that is dropped.
        seed, step: what the numbers are drawn for.
        rows: int64 [T] for each part, the global indices of the rows that the next pass sees; counted from 0 where none are given.
    """

    def __init__(self, p: float, seed: int = 0) -> None:
        self.p, self.seed, self.step = p, seed, 0
        self.rows: dict[str, Tensor] = {}

    @_disable_dynamo  # the numbers are drawn block by block, each with constants of its layer and step
    def __call__(self, x: Tensor, part: str, layer: int) -> Tensor:
        """x [T, C] with values dropped and the others scaled by 1 / (1 - p). Every layer draws numbers of its own."""
        rows = self.rows[part] if part in self.rows else torch.arange(x.shape[0], device=x.device)
        drawn = ops.uniform(self.seed ^ (layer + 1) << 40, self.step, rows, x.shape[1])
        return x * ((drawn >= 2 * self.p - 1) / (1 - self.p)).to(x.dtype)


class AdaptedLinear(nn.Module):
    """A frozen Linear with LoRA or DoRA: input [T, in], output [T, out].

    The layer may fuse several Hugging Face projections of `rows` rows each. Each has an A of its own, stacked in `a`; B and the magnitude
    are rows as the weight's are. All three are fp32. A is drawn as PEFT draws it, B is zero, the magnitude is the norm of W's rows: a fresh
    adapter changes nothing.

    Attributes:
        a: [projections * rank, in]; b: [out, rank]; magnitude: [out], None for LoRA.
        norm: ||W + s B A|| of the rows [out] where `refresh_norms` keeps it; None means that it is looked after by itself.
    """

    def __init__(
        self, base: Linear, rows: Sequence[int], rank: int, scaling: float, dora: bool, dropout: Dropout, place: tuple[str, int]
    ) -> None:
        super().__init__()
        out, width, device = *base.weight.shape, base.weight.device
        assert sum(rows) == out
        self.base, self.rows, self.rank, self.scaling = base, tuple(rows), rank, scaling
        self.dropout, (self.part, self.layer) = dropout, place
        self.a = nn.Parameter(torch.empty(len(rows) * rank, width, device=device).uniform_(-(width**-0.5), width**-0.5))
        self.b = nn.Parameter(torch.zeros(out, rank, device=device))
        self.magnitude = nn.Parameter(ops.dora_square(base.weight).sqrt_().float()) if dora else None
        self.norm: Tensor | None = None
        self._row_norm = RowNorm()

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def weight(self) -> Tensor:
        """g * (W + s B A) [out, in], differentiable: for what takes the matrix itself. Knows no dropout."""
        weight = self.base.weight
        whole = torch.addmm(weight, self._b().to(weight.dtype), self.a.to(weight.dtype), alpha=self.scaling)
        return whole if self.magnitude is None else whole * (self.magnitude / self._norm())[:, None].to(whole.dtype)

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.dropout(x, self.part, self.layer) if self.training and self.dropout.p else x
        norm = None if self.magnitude is None else self._norm()
        h, weight, bias = ops.linear(dropped, self.a.to(x.dtype)), self.base.weight, self.base.bias
        if ops.dora_folds(x, weight):
            return ops.dora_folded(x, h, weight, self.b, self.magnitude, norm, bias, scaling=self.scaling, rows=self.rows)
        return ops.dora_combine(ops.linear(x, weight, bias), h, self._b().to(x.dtype), self.magnitude, norm, bias, scaling=self.scaling)

    def _b(self) -> Tensor:
        """B as it stands against the stacked A: block-diagonal [out, projections * rank]."""
        return block_diagonal(self.b, self.rows)

    def _norm(self) -> Tensor:
        if self.norm is not None:
            return self.norm
        return self._row_norm(self.base.weight, self.a, self.b, self.scaling, self.training, self.rows)


def attach_adapters(
    model: Idefics2,
    *,
    rank: int = 64,
    alpha: float = 16.0,
    dora: bool = True,
    targets: Sequence[str] = ("vision", "text"),
    dropout: float = 0.0,
    seed: int = 0,
) -> None:
    """Freezes the model and gives the linear layers of some parts adapters to train, in place.

    Args:
        targets: among "vision", "connector", "text" and "head".
        dropout: of the adapters' branches, in training.
        seed: of A and of the dropout.

    Raises:
        ValueError: an unknown part; a model that carries adapters already; dropout where the model takes a matrix itself.
    """
    for part in targets:
        if part not in PARTS:
            raise ValueError(f"targets has {part!r}, expected parts among {', '.join(PARTS)}")
    if dropout and {"connector", "head"} & set(targets):
        raise ValueError(f"dropout is {dropout}, expected 0 with adapters on connector or head: their matrices are used themselves")
    names = [name for name, module in model.named_modules() if isinstance(module, Linear) and _part(name) in targets]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _attach(model, names, rank, alpha / rank, dora, Dropout(dropout, seed))


def _attach(model: Idefics2, names: Iterable[str], rank: int, scaling: float, dora: bool, dropout: Dropout) -> None:
    if adapted(model):
        raise ValueError("the model carries adapters already: merge_adapters first")
    model.requires_grad_(False)
    for layer, name in enumerate(names):
        base = model.get_submodule(name)
        rows = [view.shape[0] for _, view in model.hf_views(f"{name}.weight", base.weight)]
        adapter = AdaptedLinear(base, rows, rank, scaling, dora, dropout, (_part(name), layer))
        model.set_submodule(name, adapter.train(base.training))


def adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The model's layers with adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def _part(name: str) -> str | None:
    return next((part for part, prefix in PARTS.items() if name.startswith(prefix)), None)


@torch.no_grad()
def refresh_norms(model: nn.Module) -> None:
    """Computes every DoRA layer's norms anew and keeps them until the next call: once after each optimizer step.

    Where the weights are sharded (FSDP2) each rank computes its own rows; only A, and the norms, are gathered. A collective.
    """
    for layer in adapted(model).values():
        if layer.magnitude is not None:
            layer.norm = _norms(layer)


def _norms(layer: AdaptedLinear) -> Tensor:
    if not isinstance(layer.b, DTensor):
        return _norms_of_projections(layer.base.weight, layer.a, layer.b, layer.rows, layer.scaling)
    weight, b, a = layer.base.weight.to_local(), layer.b.to_local(), layer.a.full_tensor()
    first = compute_local_shape_and_global_offset(layer.b.shape, layer.b.device_mesh, layer.b.placements)[1][0]
    mine = _norms_of_projections(weight, a, b, _overlap(layer.rows, first, first + b.shape[0]), layer.scaling)
    return DTensor.from_local(mine, layer.b.device_mesh, layer.b.placements, shape=layer.b.shape[:1], stride=(1,)).full_tensor()


def _norms_of_projections(weight: Tensor, a: Tensor, b: Tensor, rows: Sequence[int], scaling: float) -> Tensor:
    """The norms of a layer's rows, `rows` of each projection, each by the projection's own A."""
    parts = zip(weight.split(list(rows)), a.chunk(len(rows)), b.split(list(rows)), strict=True)
    return torch.cat([ops.dora_norm(*part, scaling) for part in parts])


def _overlap(rows: Sequence[int], first: int, last: int) -> list[int]:
    """How many of the rows first..last belong to each of neighbouring groups of `rows`."""
    ends = list(accumulate(rows))
    return [max(0, min(end, last) - max(end - count, first)) for end, count in zip(ends, rows, strict=True)]


@torch.no_grad()
def merge_adapters(model: Idefics2) -> None:
    """Writes g * (W + s B A) into the weights and takes the adapters off, in place. The products are made in fp32."""
    for name, layer in adapted(model).items():
        base = layer.base
        dtype = base.weight.dtype
        layer.base = base.float()
        base.weight.copy_(layer.weight)
        model.set_submodule(name, base.to(dtype))


# --- PEFT's format ---

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


def save_adapters(model: Idefics2, path: str | os.PathLike[str], base: str = "") -> None:
    """Writes the adapters, and whatever else is trained, as PEFT's `save_pretrained` would.

    Weights that are trained whole stand in PEFT's `modules_to_save`. Sharded weights are gathered: every rank must call, rank 0 writes.

    Args:
        path: the folder; `base`: name or folder of the model they belong to.

    Raises:
        ValueError: a model without adapters.
    """
    layers = adapted(model)
    if not layers:
        raise ValueError("the model carries no adapters: attach_adapters or load_adapters first")
    tensors, targets = {}, []
    for name, layer in layers.items():
        views = model.hf_views(f"{name}.weight", layer.base.weight)
        for index, (hf, rows) in enumerate(zip([hf for hf, _ in views], accumulate(layer.rows), strict=True)):
            module = hf.removesuffix(".weight")
            targets.append(module)
            own = slice(rows - layer.rows[index], rows)
            tensors[f"{module}.lora_A.weight"] = _whole(layer.a)[index * layer.rank : (index + 1) * layer.rank]
            tensors[f"{module}.lora_B.weight"] = _whole(layer.b)[own]
            if layer.magnitude is not None:
                tensors[f"{module}.lora_magnitude_vector"] = _whole(layer.magnitude)[own]
    trained = {name: _whole(tensor.detach()) for name, tensor in model.named_parameters() if tensor.requires_grad}
    whole = {hf: view for name, tensor in trained.items() for hf, view in model.hf_views(name, tensor)}
    tensors |= whole
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({PREFIX + name: t.detach().contiguous().cpu() for name, t in tensors.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
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
def load_adapters(model: Idefics2, path: str | os.PathLike[str]) -> None:
    """Attaches the adapters of a folder in PEFT's format (LoRA, DoRA), and copies the weights that were trained whole, in place.

    A fused layer of which only some projections have adapters gets neutral ones for the others.

    Raises:
        ValueError: no such folder, an adapter of another kind, or weights that are not this model's.
    """
    config, tensors = _read_adapters(Path(path))
    rank, dora = config["r"], bool(config.get("use_dora"))
    scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    targets = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    linears = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    views = {
        name: [hf.removesuffix(".weight") for hf, _ in model.hf_views(f"{name}.weight", model.get_submodule(name).weight)]
        for name in linears
    }
    chosen = [name for name in linears if _part(name) and targets & set(views[name])]
    unknown = targets - {hf for name in chosen for hf in views[name]}
    if unknown:
        raise ValueError(f"{path} has adapters for {sorted(unknown)[0]} and {len(unknown) - 1} more, which this model does not adapt")
    _attach(model, chosen, rank, scaling, dora, Dropout(0.0))
    for name in chosen:
        layer = model.get_submodule(name)
        kinds = {"lora_A.weight": layer.a.split(rank), "lora_B.weight": layer.b.split(layer.rows)}
        if dora:
            kinds["lora_magnitude_vector"] = layer.magnitude.split(layer.rows)
        for kind, parts in kinds.items():
            for hf, part in zip(views[name], parts, strict=True):
                if hf in targets:
                    _copy(part, tensors, f"{hf}.{kind}", path)
    whole = model.hf_tensors()
    for name in [name for name in tensors if name in whole]:
        _copy(whole[name], tensors, name, path)
    if tensors:
        raise ValueError(f"{path} has {sorted(tensors)[0]} and {len(tensors) - 1} more tensors that are not this model's")


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
