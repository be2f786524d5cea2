"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Reading is in two halves: a plan, made from the config, the headers and the tensors, in which every mistake is found; and its execution,
which raises nothing. A refused adapter leaves the model as it was.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from idefics2_fast import ops
from idefics2_fast.adapter_config import REFUSED, AdapterConfig
from idefics2_fast.adapters import (
    Adapted,
    AdaptedEmbedding,
    AdaptedLinear,
    Dropout,
    check_name,
    install,
    layers_of,
    linears,
    one_at_a_time,
    part_of,
    projections,
)
from idefics2_fast.layers import Brought
from idefics2_fast.model import Idefics2
from idefics2_fast.weights import read_header

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TABLE, HEAD = "model.text_model.embed_tokens", "lm_head"
ROWS = "token_adapter.trainable_tokens_delta"
DTYPES = ("F64", "F32", "BF16", "F16")
HEADER_BYTES = 16 * 2**20

# What a module's adapter consists of, by the ends of the tensors' names.
OF_LINEAR = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude", "lora_B.bias": "shift"}
OF_TABLE = {"lora_embedding_A": "a", "lora_embedding_B": "b", "lora_magnitude_vector": "magnitude"}


# --- saving ---


def save_adapters(model: Idefics2, path: str | os.PathLike[str], base: str = "", *, name: str | None = None) -> None:
    """Writes an adapter, and whatever else is trained or came with it, as PEFT's `save_pretrained` would.

    Weights that are trained whole stand in PEFT's `modules_to_save`, each with all of its module's tensors. Those of layers that carry
    adapters, which PEFT keeps out of there, stand under the names that they have in PEFT's model. Sharded weights are gathered: every
    rank must call, rank 0 writes.

    Args:
        path: the folder; `base`: name or folder of the model they belong to.
        name: the adapter, where they have names.

    Raises:
        ValueError: a model without adapters, or without this one.
    """
    layers, tensors, modules = layers_of(model, name), {}, {}
    for place, layer in layers.items():
        parts = _parts_of_table(layer) if isinstance(layer, AdaptedEmbedding) else _parts_of_linear(model, place, layer)
        for module, (rank, scaling, named) in parts.items():
            modules[module] = rank, scaling
            tensors |= {f"{module}.{kind}": tensor for kind, tensor in named.items()}
    whole = _Whole.of(model, name, modules)
    tensors |= whole.tensors
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        folder = Path(path)
        config = REFUSED | _ranks_and_alphas(modules) | whole.config() | _of_all(layers, base)
        stored = {PREFIX + hf: t.detach().contiguous().cpu() for hf, t in tensors.items()}
        _write(folder, stored, json.dumps(config, indent=2) + "\n")


def _write(folder: Path, tensors: dict[str, Tensor], config: str) -> None:
    """Writes both files aside, then puts them into their places: a full disk costs no adapter that is there.

    The config goes first and comes last: without it nothing loads.
    """
    aside = folder / ".saving-adapter"
    shutil.rmtree(aside, ignore_errors=True)  # of a save that was killed
    aside.mkdir(parents=True)
    try:
        save_file(tensors, aside / WEIGHTS_FILE, {"format": "pt"})
        (aside / CONFIG_FILE).write_text(config)
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            with open(aside / file, "rb") as written:
                os.fsync(written.fileno())
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        os.replace(aside / WEIGHTS_FILE, folder / WEIGHTS_FILE)
        os.replace(aside / CONFIG_FILE, folder / CONFIG_FILE)
    finally:
        shutil.rmtree(aside)


Part = tuple[int, float, dict[str, Tensor]]  # rank, s, tensors by the ends of their names


def _parts_of_linear(model: Idefics2, place: str, layer: AdaptedLinear) -> dict[str, Part]:
    """What a layer's adapter is to PEFT, by Hugging Face's modules; those that are neutral, and were none in the file, are none."""
    names, parts = list(projections(model, place, layer.base)), {}
    whole = {kind: _whole(t) for kind in ("a", "b", "magnitude", "shift") if (t := getattr(layer, kind)) is not None}
    for index, (module, end) in enumerate(zip(names, accumulate(layer.rows), strict=True)):
        own = slice(end - layer.rows[index], end)
        a, b = whole["a"][index * layer.rank : (index + 1) * layer.rank], whole["b"][own]
        rank = layer.ranks[index]
        if rank == 0 and not b.any() and ("magnitude" not in whole or torch.equal(whole["magnitude"][own], _fresh(layer)[own])):
            continue
        if rank == 0 or (a[rank:].any() and b[:, rank:].any()):
            rank = layer.rank
        named = {"lora_A.weight": a[:rank], "lora_B.weight": b[:, :rank]}
        named |= {end: whole[kind][own] for end, kind in OF_LINEAR.items() if kind in ("magnitude", "shift") and kind in whole}
        parts[module] = rank, layer.scaling, named
    return parts


def _fresh(layer: AdaptedLinear) -> Tensor:
    """The magnitude of an adapter that changes nothing."""
    return ops.dora_square(_whole(layer.base.weight)).sqrt_().float()


def _parts_of_table(layer: AdaptedEmbedding) -> dict[str, Part]:
    named = {end: _whole(t) for end, kind in OF_TABLE.items() if (t := getattr(layer, kind)) is not None}
    return {TABLE: (layer.rank, layer.scaling, named)}


def _ranks_and_alphas(modules: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """The commonest rank and alpha, and PEFT's patterns for the modules that have others."""
    alphas = {module: _tidy(rank * scaling) for module, (rank, scaling) in modules.items()}
    ranks = {module: rank for module, (rank, _) in modules.items()}
    (rank, _), (alpha, _) = (Counter(values.values()).most_common(1)[0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
        "alpha_pattern": {module: own for module, own in alphas.items() if own != alpha},
        "target_modules": list(modules),
    }


def _tidy(alpha: float) -> float:
    """A whole number where only rounding parts it from one."""
    return float(round(alpha)) if abs(alpha - round(alpha)) < 1e-9 * abs(alpha) else alpha


def _of_all(layers: Mapping[str, Adapted], base: str) -> dict[str, Any]:
    linear = [layer for layer in layers.values() if isinstance(layer, AdaptedLinear)]
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base or None,
        "lora_dropout": linear[0].dropout.p if linear else 0.0,
        "use_dora": any(layer.magnitude is not None for layer in layers.values()),
        "lora_bias": any(layer.shift is not None for layer in layers.values()),
        "use_rslora": False,
        "fan_in_fan_out": False,
        "task_type": None,
        "inference_mode": True,
    }


@dataclass(frozen=True)
class _Whole:
    """What goes beside an adapter's layers: tensors by PEFT's names, and the config's fields that speak of them."""

    tensors: dict[str, Tensor]
    modules: list[str]
    bias: str
    rows: dict[str, list[int]]

    @classmethod
    def of(cls, model: Idefics2, name: str | None, adapters: Iterable[str]) -> _Whole:
        places = {
            hf: place
            for place, tensor in model.named_parameters()
            for hf, _ in model.hf_views(place, torch.empty(tensor.shape, device="meta"))
        }
        brought, trained = model.choice.brought[name], {place for place, tensor in model.named_parameters() if tensor.requires_grad}
        wanted = {hf for hf, place in places.items() if place in trained} | brought.tensors
        bias = _bias_of(wanted, places, adapters)
        modules = _modules_of(wanted if bias == "none" else {hf for hf in wanted if not hf.endswith(".bias")}, places, adapters)
        wanted |= {hf for hf in places if any(hf.startswith(f"{module}.") for module in modules)}
        rows = {module: [*ids] for module, ids in brought.rows.items() if f"{module}.weight" not in wanted}
        gathered: dict[str, Tensor] = {}
        needed = {places[hf] for hf in wanted} | {places[f"{module}.weight"] for module in rows}
        for place, tensor in model.named_parameters():  # in the same order on every rank
            if place in needed:
                gathered |= dict(model.hf_views(place, _whole(tensor.detach())))
        tensors = {_in_peft(hf, adapters): gathered[hf] for hf in places if hf in wanted}
        for module, ids in rows.items():
            table = gathered[f"{module}.weight"]
            tensors[f"{module}.{ROWS}"] = table.index_select(0, torch.tensor(ids, device=table.device))
        if "model.connector" in modules:
            modules = ["connector" if module == "model.connector" else module for module in modules]
        return cls(tensors, modules, bias, rows)

    def config(self) -> dict[str, Any]:
        return {
            "modules_to_save": self.modules or None,
            "bias": self.bias,
            "trainable_token_indices": self.rows or None,
        }


def _in_peft(hf: str, adapters: Iterable[str]) -> str:
    """The name of a tensor in PEFT's model: a layer beneath an adapter is its `base_layer`."""
    module, _, kind = hf.rpartition(".")
    return f"{module}.base_layer.{kind}" if module in set(adapters) else hf


def _bias_of(wanted: set[str], every: Iterable[str], adapters: Iterable[str]) -> str:
    """PEFT's field: whether it keeps all biases, or those of the layers with adapters, when it saves."""
    biases = {hf for hf in every if hf.endswith(".bias")}
    own = {f"{module}.bias" for module in adapters} & biases
    if biases <= wanted:
        return "all"
    return "lora_only" if own and own <= wanted else "none"


def _modules_of(wanted: Iterable[str], every: Iterable[str], adapters: Iterable[str]) -> list[str]:
    """PEFT's `modules_to_save`: the modules that own these tensors, and hold no adapter. The connector is one where all of it is wanted."""
    owners = {hf.rpartition(".")[0] for hf in wanted}
    connector = {hf for hf in every if hf.startswith("model.connector.")}
    if connector <= set(wanted):
        owners = {owner for owner in owners if not owner.startswith("model.connector.")} | {"model.connector"}
    free = {owner for owner in owners if not any(f"{module}.".startswith(f"{owner}.") for module in adapters)}
    if "model.connector" in owners - free:
        free |= set(_modules_of(connector - {next(iter(connector))}, connector, adapters))
    return sorted(owner for owner in free if not any(owner.startswith(f"{other}.") for other in free))


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# --- loading ---


@one_at_a_time
@torch.no_grad()
def load_adapters(model: Idefics2, path: str | os.PathLike[str], *, name: str | None = None) -> None:
    """Attaches the adapter of a folder in PEFT's format (LoRA, DoRA), and copies the weights that were trained whole, in place.

    A fused layer of which only some projections have adapters gets neutral ones for the others. A model that refuses an adapter is as it
    was before.

    Args:
        name: of one adapter among several, which becomes the usual one, see `use_adapter`. The base's weights are the same for all: what a
            second one brings must be what the model has.

    Raises:
        ValueError: no such folder, damaged files, an adapter of another kind, or weights that are not this model's.
    """
    check_name(model, name)
    plan = _plan(model, Path(path))
    own = model.hf_tensors()
    for hf, tensor in plan.whole.items():
        own[hf].copy_(tensor)
    for module, (ids, rows) in plan.rows.items():
        own[f"{module}.weight"].index_copy_(0, ids, rows)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = {place: _layer(model, place, parts, number) for number, (place, parts) in enumerate(plan.places.items())}
    brought = Brought(frozenset(plan.whole), {module: ids.tolist() for module, (ids, _) in plan.rows.items()})
    install(model, name, layers, brought)


@dataclass
class _Module:
    """A Hugging Face module's adapter: its s, and its tensors by kind."""

    scaling: float
    tensors: dict[str, Tensor]

    @property
    def rank(self) -> int:
        return self.tensors["a"].shape[0]


@dataclass
class _Plan:
    """What is done to the model.

    Attributes:
        whole: tensors by Hugging Face's names, in the model's dtype.
        rows: by the table's name the indices and their rows.
        places: by the layer's place the adapters of its modules.
    """

    whole: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    places: dict[str, dict[str, _Module]] = field(default_factory=dict)


class _Reader:
    """An adapter's folder against a model: everything that can be wrong is found here."""

    def __init__(self, model: Idefics2, folder: Path) -> None:
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / file).is_file():
                pickled = " (adapter_model.bin can run code and is never read)" if (folder / "adapter_model.bin").is_file() else ""
                raise ValueError(f"no adapter at {folder}: expected {CONFIG_FILE} and {WEIGHTS_FILE}{pickled}")
        self.model, self.path = model, folder / WEIGHTS_FILE
        self.config = AdapterConfig.read(folder / CONFIG_FILE)
        self.own = dict(model.hf_tensors().items())
        self.file_names = self._header()
        self.left = dict.fromkeys(self.file_names)  # those that have found no use yet

    def _header(self) -> dict[str, str]:
        """The file's tensors by Hugging Face's names of the model."""
        try:
            with open(self.path, "rb") as file:
                length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
            if length > HEADER_BYTES:
                raise ValueError(f"{self.path} has a header of {length} bytes, expected {HEADER_BYTES} at most")
            self.entries = read_header(self.path)
        except (OSError, RecursionError) as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from None
        names: dict[str, str] = {}
        for name, entry in self.entries.items():
            hf = name.removeprefix(PREFIX).replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")
            if entry.dtype not in DTYPES:
                raise ValueError(f"{self.path}: {name!r} is {entry.dtype}, expected one of {', '.join(DTYPES)}")
            if hf in names:
                raise ValueError(f"{self.path} has both {names[hf]!r} and {name!r}, expected one of them: they are the same tensor")
            names[hf] = name
        return names

    def _take(self, hf: str, shape: Sequence[int], by: str = "") -> str:
        """Finds a use for a tensor of this shape; `by`: which fields of the config ask for it."""
        found = self.entries[self.file_names[hf]].shape if hf in self.left else None
        if found != tuple(shape):
            found = "nothing" if found is None else list(found)
            raise ValueError(f"{self.path} has {found} for {hf}, expected {list(shape)}{by}")
        del self.left[hf]
        return hf

    def _adapters(self) -> dict[str, dict[str, dict[str, str]]]:
        """By the layer's place and the module the tensors' names by kind."""
        wanted = {hf.removesuffix(f".{end}") for hf in self.left for end in OF_LINEAR if hf.endswith(f".{end}")}
        found: dict[str, dict[str, dict[str, str]]] = {}
        for place, linear in linears(self.model).items():
            rows = projections(self.model, place, linear)
            for module in rows.keys() & wanted if part_of(place) else ():
                width, rank = linear.weight.shape[1], self.config.rank(module)
                shapes = {"a": (rank, width), "b": (rows[module], rank), "magnitude": (rows[module],), "shift": (rows[module],)}
                found.setdefault(place, {})[module] = self._module(module, OF_LINEAR, shapes)
        if any(f"{TABLE}.{end}" in self.left for end in OF_TABLE):
            (vocab, width), rank = self.own[f"{TABLE}.weight"].shape, self.config.rank(TABLE)
            shapes = {"a": (rank, vocab), "b": (width, rank), "magnitude": (width,)}
            if self.config.shifts:
                raise ValueError(f"{self.config.path} has lora_bias with an adapter on {TABLE}, which PEFT does not have")
            found["text_model.embed_tokens"] = {TABLE: self._module(TABLE, OF_TABLE, shapes)}
        known = {module for modules in found.values() for module in modules}
        if unknown := sorted(wanted - known):
            raise ValueError(f"{self.path} has adapters for {unknown[0]} and {len(unknown) - 1} more, which this model does not adapt")
        return found

    def _module(self, module: str, ends: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
        config = self.config
        if not config.targets(module):
            raise ValueError(f"{self.path} has an adapter for {module}, which {config.path.name} does not target")
        if config.shifts and (module == HEAD or (".connector." in module and module.endswith((".k_proj", ".v_proj")))):
            raise ValueError(f"{config.path} has lora_bias with an adapter on {module}, whose matrix the model takes itself")
        absent = {"magnitude"} if not config.dora else set()
        absent |= {"shift"} if not config.shifts else set()
        by = f" by r and rank_pattern in {config.path.name}"
        return {kind: self._take(f"{module}.{end}", shapes[kind], by) for end, kind in ends.items() if kind not in absent}

    def _token_rows(self, adapted_modules: Iterable[str]) -> dict[str, tuple[str, list[int]]]:
        """By the table's name the tensor and the indices of its rows."""
        found, path = {}, self.config.path
        for end, ids in self.config.token_indices.items():
            module = next((module for module in (TABLE, HEAD) if module.endswith(end)), None) if end else None
            if module is None or module in found or module in adapted_modules:
                expected = "expected embed_tokens or lm_head, once, and without an adapter"
                raise ValueError(f"{path} has trainable_token_indices for {end!r:.200}, {expected}")
            vocab, width = self.own[f"{module}.weight"].shape
            if len(set(ids)) != len(ids) or any(token >= vocab for token in ids):
                raise ValueError(f"{path} has trainable_token_indices {ids!s:.200}, expected different ids below {vocab}")
            found[module] = self._take(f"{module}.{ROWS}", (len(ids), width)), ids
        return found

    def plan(self) -> _Plan:
        """Checks names and shapes, then reads, then checks values."""
        places = self._adapters()
        if not places:
            raise ValueError(f"{self.path} holds no adapter that this model can carry: expected lora_A and lora_B of its layers")
        rows = self._token_rows({module for modules in places.values() for module in modules})
        whole = [self._take(hf, self.own[hf].shape) for hf in list(self.left) if hf in self.own]
        if self.left:
            raise ValueError(f"{self.path} has {min(self.left)} and {len(self.left) - 1} more tensors that are not this model's")
        self._check_saved(whole, {module for modules in places.values() for module in modules})
        try:
            stored = load_file(self.path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from None
        get = lambda hf, like: self._finite(hf, stored[self.file_names[hf]].to(like))  # noqa: E731
        plan = _Plan()
        for place, modules in places.items():
            plan.places[place] = {
                module: _Module(self.config.scaling(module), {kind: get(hf, torch.float32) for kind, hf in kinds.items()})
                for module, kinds in modules.items()
            }
        plan.whole = {hf: self._shared(hf, get(hf, self.own[hf]), self.own[hf]) for hf in whole}
        for module, (hf, ids) in rows.items():
            table = self.own[f"{module}.weight"]
            index = torch.tensor(ids, dtype=torch.int64, device=table.device)
            plan.rows[module] = index, self._shared(hf, get(hf, table), table.index_select(0, index))
        return plan

    def _check_saved(self, whole: Sequence[str], adapters: Iterable[str]) -> None:
        """Whether everything is there that the config speaks of."""
        bias, owners = self.config.bias, adapters if self.config.bias == "lora_only" else ()
        biases = [hf for hf in self.own if hf.endswith(".bias")] if bias == "all" else [f"{module}.bias" for module in owners]
        if absent := sorted(set(biases) & self.own.keys() - set(whole)):
            raise ValueError(f"{self.config.path} has bias = {bias!r}, expected {absent[0]} in {self.path.name}")
        for name in self.config.modules_to_save:
            if not any(_is_within(hf, name) for hf in whole):
                raise ValueError(f"{self.config.path} has {name!r} in modules_to_save, of which {self.path.name} holds no tensor")

    def _finite(self, hf: str, tensor: Tensor) -> Tensor:
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{self.path}: {hf} has values that are not finite in {str(tensor.dtype).removeprefix('torch.')}")
        return tensor

    def _shared(self, hf: str, tensor: Tensor, own: Tensor) -> Tensor:
        """A weight becomes the base's, unless adapters stand on it that were made for its present one."""
        names = self.model.choice.names
        if names and not torch.equal(own, tensor):
            raise ValueError(f"{self.path} has a {hf} of its own, expected that of {', '.join(names)}: they share one base")
        return tensor


def _is_within(hf: str, name: str) -> bool:
    """Whether a tensor is of a module that `modules_to_save` names: by the end of the module's name, as PEFT has it."""
    modules = list(accumulate(hf.split(".")[:-1], "{}.{}".format))
    return any(module.endswith(name) for module in modules)


def _plan(model: Idefics2, folder: Path) -> _Plan:
    return _Reader(model, folder).plan()


def _layer(model: Idefics2, place: str, modules: Mapping[str, _Module], number: int) -> Adapted:
    """The layer that a plan speaks of, not yet in its place."""
    layer = model.get_submodule(place)
    base = getattr(layer, "base", layer)
    one = max(modules.values(), key=lambda module: abs(module.scaling))
    rank, dora = max(module.rank for module in modules.values()), "magnitude" in one.tensors
    if TABLE in modules:
        made = AdaptedEmbedding(base, rank, one.scaling, dora)
        for kind, tensor in one.tensors.items():
            getattr(made, kind).copy_(tensor)
        return made
    rows = projections(model, place, base)
    made = AdaptedLinear(base, [*rows.values()], rank, one.scaling, dora, Dropout(0.0), (part_of(place), number))
    made.ranks = tuple(modules[module].rank if module in modules else 0 for module in rows)
    if "shift" in one.tensors:
        made.shift = torch.nn.Parameter(torch.zeros(base.weight.shape[0], device=base.weight.device))
    for index, (module, end) in enumerate(zip(rows, accumulate(rows.values()), strict=True)):
        if module not in modules:
            continue
        own, part, tensors = slice(end - rows[module], end), modules[module], modules[module].tensors
        # s is one for the layer; what a projection's own differs by goes into its B
        factor = 1.0 if part.scaling == one.scaling else part.scaling / one.scaling
        made.a[index * rank : (index + 1) * rank] = torch.nn.functional.pad(tensors["a"], (0, 0, 0, rank - part.rank))
        made.b[own] = torch.nn.functional.pad(tensors["b"] * factor, (0, rank - part.rank))
        if dora:
            made.magnitude[own] = tensors["magnitude"]
        if "shift" in tensors:
            made.shift[own] = tensors["shift"] * factor
    return made
