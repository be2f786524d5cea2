"""LoRA and DoRA on the engine's linear layers; on disk, in PEFT's format: `adapter_files.py`.

    attach_adapters(model, rank=64, alpha=16)      # training: the base is frozen
    save_adapters(model, path)                     # PEFT, the patch and load_adapters read it
    load_adapters(model, path); merge_adapters(model)

One adapter is trained, or merged. Several on one base have names, and each document of a batch takes its own:

    load_adapters(model, french, name="fr"); load_adapters(model, german, name="de")
    model.generate(replace(batch, adapters=("de", None, "fr")))     # unmerged; None is the base alone
    use_adapter(model, "fr")                                        # of batches that do not say

The formula stands in `kernels/dora_linear.py`. A layer that the model fuses (q, k, v; k, v; gate, up) carries an adapter for each of its
Hugging Face projections; their A are one product, their B one block-diagonal matrix.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import accumulate
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from idefics2_fast import ops
from idefics2_fast.layers import BASE, Brought, Embedding, Linear, Route, first_row
from idefics2_fast.model import Idefics2
from idefics2_fast.row_norm import RowNorm, block_diagonal

# Parts of a model whose linear layers can carry adapters, and where they are.
PARTS = {"vision": "vision_model.layers.", "connector": "connector.", "text": "text_model.layers.", "head": "lm_head"}


# What dropout acts upon: the adapter's branch alone, or, as in PEFT 0.21, all that DoRA adds to the frozen layer. LoRA adds nothing else.
RULES = ("branch", "peft")


class Dropout:
    """What adapters drop: values whose counter-based number falls below p, so that it depends on nothing else.

    Attributes:
        p: the share that is dropped.
        rule: one of `RULES`.
        seed, step: what the numbers are drawn for.
        rows: int64 [T] for each part, the global indices of the rows that the next pass sees; counted from 0 where none are given.
    """

    def __init__(self, p: float, seed: int = 0, rule: str = "branch") -> None:
        self.p, self.rule, self.seed, self.step = p, rule, seed, 0
        self.rows: dict[str, Tensor] = {}

    @_disable_dynamo  # the numbers are drawn block by block, each with constants of its layer and step
    def __call__(self, x: Tensor, part: str, layer: int, first: int = 0) -> Tensor:
        """x [T, C], from row `first` of those in view, with values dropped and the others scaled by 1 / (1 - p).

        Every layer draws numbers of its own.
        """
        first += first_row.get()
        last = first + x.shape[0]
        rows = self.rows[part][first:last] if part in self.rows else torch.arange(first, last, device=x.device)
        drawn = ops.uniform(self.seed ^ (layer + 1) << 40, self.step, rows, x.shape[1])
        return x * ((drawn >= 2 * self.p - 1) / (1 - self.p)).to(x.dtype)


class Adapted(nn.Module):
    """A frozen layer with an adapter of its own.

    Attributes:
        base: the layer. a, b: fp32 factors of rank `rank`; `scaling`: s.
        magnitude: [out], None for LoRA.
        shift: what PEFT's `lora_bias` adds to B's product, [out]; None for none.
    """

    base: nn.Module
    a: nn.Parameter
    b: nn.Parameter
    magnitude: nn.Parameter | None
    shift: nn.Parameter | None
    rank: int
    scaling: float

    def matrix(self, route: Route = BASE) -> Tensor:
        """The weight with the adapter in it, differentiable: for what takes the matrix itself. Knows no dropout."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """`matrix` of a call that keeps no norms."""
        return self.matrix()

    def row_norm(self, route: Route = BASE) -> Tensor:
        """DoRA's norms [out]: the call's, where it keeps them."""
        if torch.compiler.is_compiling() or route.norms is None or self not in route.norms:
            return self._norm()
        return route.norms[self]

    def _norm(self) -> Tensor:
        raise NotImplementedError


class AdaptedLinear(Adapted):
    """A frozen Linear with LoRA or DoRA: input [T, in], output [T, out].

    The layer may fuse several Hugging Face projections of `rows` rows each. Each has an A of its own, stacked in `a`; B and the magnitude
    are rows as the weight's are. All three are fp32. A is drawn as PEFT draws it, B is zero, the magnitude is the norm of W's rows: a fresh
    adapter changes nothing.

    Attributes:
        a: [projections * rank, in]; b: [out, rank]; magnitude: [out], None for LoRA.
        ranks: of the projections, where some are smaller and filled up with zeros; 0 for one whose adapter is neutral.
        norm: ||W + s B A|| of the rows [out] where `refresh_norms` keeps it; None means that it is looked after by itself. It is taken
            for as long as no weight is written in place, unless weights are sharded.
    """

    def __init__(
        self, base: Linear, rows: Sequence[int], rank: int, scaling: float, dora: bool, dropout: Dropout, place: tuple[str, int]
    ) -> None:
        super().__init__()
        out, width, device = *base.weight.shape, base.weight.device
        assert sum(rows) == out
        self.base, self.rows, self.rank, self.scaling = base, tuple(rows), rank, scaling
        self.ranks = (rank,) * len(self.rows)
        self.dropout, (self.part, self.layer) = dropout, place
        self.a = nn.Parameter(torch.empty(len(rows) * rank, width, device=device).uniform_(-(width**-0.5), width**-0.5))
        self.b = nn.Parameter(torch.zeros(out, rank, device=device))
        self.magnitude = nn.Parameter(ops.dora_square(base.weight).sqrt_().float()) if dora else None
        self.register_parameter("shift", None)
        self.norm: Tensor | None = None
        self._norm_of: tuple[int, ...] | None = None  # the weights' versions when `norm` was made
        self._row_norm = RowNorm()

    @property
    def bias(self) -> Tensor | None:
        if self.shift is None:
            return self.base.bias
        shift = (self.scaling * self.shift).to(self.base.weight.dtype)
        return shift if self.base.bias is None else self.base.bias + shift

    def matrix(self, route: Route = BASE) -> Tensor:
        """g * (W + s B A) [out, in]."""
        weight = self.base.weight
        whole = torch.addmm(weight, self._b().to(weight.dtype), self.a.to(weight.dtype), alpha=self.scaling)
        return whole if self.magnitude is None else whole * (self.magnitude / self.row_norm(route))[:, None].to(whole.dtype)

    def forward(self, x: Tensor, route: Route = BASE) -> Tensor:
        weight = self.base.weight
        if self._base_sees_dropout or not ops.dora_folds(x, weight):
            return self.add(x, ops.linear(x, weight, self.base.bias), route)
        norm, h = None if self.magnitude is None else self.row_norm(route), ops.linear(self._dropped(x), self.a.to(x.dtype))
        return ops.dora_folded(x, h, weight, self.b, self.magnitude, norm, self.bias, scaling=self.scaling, rows=self.rows)

    def add(self, x: Tensor, y: Tensor, route: Route = BASE, first: int = 0) -> Tensor:
        """The output for rows x of which the base makes y: all of the pass' rows, or some of them, from row `first`."""
        dropped, norm = self._dropped(x, first), None if self.magnitude is None else self.row_norm(route)
        h, b, bias = ops.linear(dropped, self.a.to(x.dtype)), self._b().to(x.dtype), self.base.bias
        if self._base_sees_dropout:
            seen = ops.linear(dropped, self.base.weight)
            return y - seen + ops.dora_combine(seen, h, b, self.magnitude, norm, scaling=self.scaling)
        out = ops.dora_combine(y, h, b, self.magnitude, norm, bias, scaling=self.scaling)
        return out if self.shift is None else out + (self.scaling * self.shift).to(out.dtype)

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout.p > 0

    @property
    def _base_sees_dropout(self) -> bool:
        return self._drops and self.dropout.rule == "peft" and self.magnitude is not None

    def _dropped(self, x: Tensor, first: int = 0) -> Tensor:
        return self.dropout(x, self.part, self.layer, first) if self._drops else x

    def _b(self) -> Tensor:
        """B as it stands against the stacked A: block-diagonal [out, projections * rank]."""
        return block_diagonal(self.b, self.rows)

    def keep(self, norm: Tensor) -> None:
        """Takes this for the norm of the weights as they are."""
        self.norm, self._norm_of = norm, self._versions()

    def _versions(self) -> tuple[int, ...] | None:
        """Of the weights that the norm is made of. None where FSDP2, or inference mode, does not say when they are written."""
        weights = self.base.weight, self.a, self.b
        hidden = any(isinstance(weight, DTensor) or weight.is_inference() for weight in weights)
        return None if hidden else tuple(weight._version for weight in weights)

    def _norm(self) -> Tensor:
        if self.norm is not None and (torch.compiler.is_compiling() or self._norm_of is None or self._norm_of == self._versions()):
            return self.norm
        return self._row_norm(self.base.weight, self.a, self.b, self.scaling, self.training, self.rows)


class AdaptedEmbedding(Adapted):
    """A frozen Embedding with LoRA or DoRA: ids [T] to rows [T, C]. Rows of image features, and noise, are the base's.

    The table is g * (W + s (B A)^T), g a factor of each column, as PEFT has it.

    Attributes:
        a: [rank, V]; b: [C, rank]; magnitude: [C], None for LoRA.
    """

    def __init__(self, base: Embedding, rank: int, scaling: float, dora: bool) -> None:
        super().__init__()
        (vocab, width), device = base.weight.shape, base.weight.device
        self.base, self.rank, self.scaling = base, rank, scaling
        self.a = nn.Parameter(torch.zeros(rank, vocab, device=device))
        self.b = nn.Parameter(torch.zeros(width, rank, device=device))
        self.magnitude = nn.Parameter(torch.zeros(width, device=device)) if dora else None
        self.register_parameter("shift", None)

    def matrix(self, route: Route = BASE) -> Tensor:
        weight = self.base.weight
        whole = torch.addmm(weight, self.a.T.to(weight.dtype), self.b.T.to(weight.dtype), alpha=self.scaling)
        return whole if self.magnitude is None else whole * (self.magnitude / self.row_norm(route)).to(whole.dtype)

    def forward(
        self,
        ids: Tensor,
        features: Tensor | None = None,
        feature_rows: Tensor | None = None,
        noise: ops.Noise | None = None,
        route: Route = BASE,
    ) -> Tensor:
        out, added = self.base(ids, features, feature_rows, noise), self.added(ids, route)
        return out + (added if features is None else added.index_fill(0, feature_rows, 0)).to(out.dtype)

    def added(self, ids: Tensor, route: Route = BASE) -> Tensor:
        """What the adapter adds to the base's rows of ids [T]: fp32 [T, C]."""
        low = self.scaling * (F.embedding(ids, self.a.T) @ self.b.T)
        if self.magnitude is None:
            return low
        gain = self.magnitude / self.row_norm(route)
        return (gain - 1) * F.embedding(ids, self.base.weight) + gain * low

    def _norm(self) -> Tensor:
        with torch.no_grad():
            return ops.dora_norm(self.base.weight.T.contiguous(), self.a, self.b, self.scaling)


class SwitchableLinear(nn.Module):
    """A frozen Linear with several named adapters, of which each row takes one or none: input [T, in], output [T, out].

    The base's product is one for all rows.
    """

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.base, self.adapters = base, nn.ModuleDict()

    def forward(self, x: Tensor, route: Route = BASE) -> Tensor:
        if route.only:
            return self.under(route.runs[0][0])(x, route)
        runs = route.within(x.shape[0])
        counts, out, first = [count for _, count in runs], [], 0
        bases = ops.linear(x, self.base.weight, self.base.bias).split(counts)
        for (name, count), rows, y in zip(runs, x.split(counts), bases, strict=True):
            out.append(self.adapters[name].add(rows, y, route, first) if name in self.adapters else y)
            first += count
        return torch.cat(out)

    def under(self, name: str | None) -> AdaptedLinear | Linear:
        """What stands for this layer where all rows take one adapter; the base for one that has nothing here."""
        return self.adapters[name] if name in self.adapters else self.base

    def matrix(self, route: Route = BASE) -> Tensor:
        """The matrix of the adapter that all rows take."""
        assert route.only
        return self.under(route.runs[0][0]).matrix(route)


class SwitchableEmbedding(nn.Module):
    """A frozen Embedding with several named adapters, of which each row takes one or none; see `AdaptedEmbedding`."""

    def __init__(self, base: Embedding) -> None:
        super().__init__()
        self.base, self.adapters = base, nn.ModuleDict()

    def forward(
        self,
        ids: Tensor,
        features: Tensor | None = None,
        feature_rows: Tensor | None = None,
        noise: ops.Noise | None = None,
        route: Route = BASE,
    ) -> Tensor:
        out, runs = self.base(ids, features, feature_rows, noise), route.within(ids.shape[0])
        added = [
            self.adapters[name].added(own, route) if name in self.adapters else out.new_zeros(own.shape[0], out.shape[1])
            for (name, _), own in zip(runs, ids.split([count for _, count in runs]), strict=True)
        ]
        whole = torch.cat([part.float() for part in added])
        return out + (whole if features is None else whole.index_fill(0, feature_rows, 0)).to(out.dtype)


# The layers that adapters stand on, for one adapter and for several with names.
SWITCHABLE = {Linear: SwitchableLinear, Embedding: SwitchableEmbedding}


P = ParamSpec("P")

# Held while adapters join or leave a model: threads that do so at once follow one another.
_changing = threading.RLock()


def one_at_a_time(change: Callable[P, None]) -> Callable[P, None]:
    """A function that changes which adapters a model carries, called by one thread at a time."""

    @wraps(change)
    def alone(*args: P.args, **kwargs: P.kwargs) -> None:
        with _changing:
            change(*args, **kwargs)

    return alone


@one_at_a_time
def attach_adapters(
    model: Idefics2,
    *,
    name: str | None = None,
    rank: int = 64,
    alpha: float = 16.0,
    dora: bool = True,
    targets: Sequence[str] = ("vision", "text"),
    dropout: float = 0.0,
    dropout_rule: str = "branch",
    seed: int = 0,
) -> None:
    """Freezes the model, adapters that it carries included, and gives the linear layers of some parts an adapter to train, in place.

    Args:
        name: of one adapter among several; it becomes the usual one, see `use_adapter`.
        targets: among "vision", "connector", "text" and "head".
        dropout: of what the adapters see, in training.
        dropout_rule: "branch" (on the adapter's branch alone) or "peft" (PEFT 0.21's: DoRA's change of the base sees it as well).
        seed: of A and of the dropout.

    Raises:
        ValueError: an unknown part or rule; a rank below 1; a model that carries adapters already, unless all have names; dropout where
            the model takes a matrix itself.
    """
    if dropout_rule not in RULES:
        raise ValueError(f"dropout_rule is {dropout_rule!r}, expected one of {', '.join(RULES)}")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank is {rank}, expected 1 or more")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}, expected a finite number")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, expected 0 or more and less than 1")
    if not targets or isinstance(targets, str):
        raise ValueError(f"targets is {targets!r}, expected parts among {', '.join(PARTS)}")
    for part in targets:
        if part not in PARTS:
            raise ValueError(f"targets has {part!r}, expected parts among {', '.join(PARTS)}")
    if dropout and {"connector", "head"} & set(targets):
        raise ValueError(f"dropout is {dropout}, expected 0 with adapters on connector or head: their matrices are used themselves")
    check_name(model, name)
    layers, fresh = {place: layer for place, layer in linears(model).items() if part_of(place) in targets}, {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        of_all = Dropout(dropout, seed, dropout_rule)
        for number, (place, base) in enumerate(layers.items()):
            rows = projections(model, place, base).values()
            fresh[place] = AdaptedLinear(base, [*rows], rank, alpha / rank, dora, of_all, (part_of(place), number))
    install(model, name, fresh)


def projections(model: Idefics2, place: str, base: Linear) -> dict[str, int]:
    """The Hugging Face modules that a layer fuses, and how many rows each has."""
    return {hf.removesuffix(".weight"): view.shape[0] for hf, view in model.hf_views(f"{place}.weight", base.weight)}


def install(model: Idefics2, name: str | None, layers: Mapping[str, Adapted], brought: Brought | None = None) -> None:
    """Freezes the model and puts an adapter's layers into their places. The caller has checked the name."""
    model.requires_grad_(False)
    for place, adapter in layers.items():
        adapter.train(adapter.base.training).requires_grad_(True)
        adapter.base.requires_grad_(False)
        if name is None:
            model.set_submodule(place, adapter)
            continue
        module = model.get_submodule(place)
        if isinstance(module, Linear | Embedding):
            module = SWITCHABLE[type(module)](adapter.base).train(adapter.base.training)
            module.adapters[name] = adapter
            model.set_submodule(place, module)
        else:  # another dictionary in the place of the one through which a call may be walking
            module.adapters = nn.ModuleDict({**module.adapters, name: adapter}).train(module.training)
    model.choice.brought[name] = brought or Brought()
    if name is not None:
        model.choice.names.append(name)
        use_adapter(model, name)


# Names that `nn.ModuleDict`, in PEFT as here, has methods of.
TAKEN = frozenset(dir(nn.ModuleDict())) | {"training"}


def check_name(model: Idefics2, name: str | None) -> None:
    """Whether an adapter of this name can join those that the model carries.

    Raises:
        ValueError: it cannot.
    """
    names = model.choice.names
    if model.kept is not None:
        raise ValueError("the model is merged with adapters that were kept: unmerge_adapters first")
    if name is not None and (not isinstance(name, str) or not name or "." in name):
        raise ValueError(f"an adapter's name is {name!r}, expected text without dots")
    if name in TAKEN:
        raise ValueError(f"an adapter's name is {name!r}, which is a method of the module that holds adapters: expected another")
    if adapted(model) and (name is None or not names):
        raise ValueError(f"the model carries adapters already, {', '.join(names) or 'without a name'}: merge_adapters first, or name each")
    if name in names:
        raise ValueError(f"the model carries adapters already, {', '.join(names)}: expected another name than {name!r}")


def use_adapter(model: Idefics2, name: str | None) -> None:
    """Makes a named adapter the usual one, which all documents take in batches without `adapters`; None for the base alone.

    Raises:
        ValueError: the model carries none of this name.
    """
    names = model.choice.names
    if not names or name not in (*names, None):
        raise ValueError(f"name is {name!r}, expected one of the model's adapters: {', '.join(names) or 'it carries none with a name'}")
    model.choice.usual = name


def adapted(model: nn.Module) -> dict[str, Adapted]:
    """The model's layers with adapters, by their place: that of the layer, followed by `.adapters.` and the name where they have names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def layers_of(model: Idefics2, name: str | None) -> dict[str, Adapted]:
    """The layers of one adapter, by the layers' own names.

    Raises:
        ValueError: the model carries none, or none of this name.
    """
    names = model.choice.names
    if not adapted(model):
        raise ValueError("the model carries no adapters: attach_adapters or load_adapters first")
    if name not in (names or [None]):
        raise ValueError(f"name is {name!r}, expected one of the model's adapters: {', '.join(names) or 'one without a name'}")
    end = "" if name is None else f".adapters.{name}"
    return {place.removesuffix(end): layer for place, layer in adapted(model).items() if place.endswith(end)}


def linears(model: nn.Module) -> dict[str, Linear]:
    """The linear layers that are, or can be, beneath adapters."""
    return {name.removesuffix(".base"): module for name, module in model.named_modules() if isinstance(module, Linear)}


def part_of(name: str) -> str | None:
    return next((part for part, prefix in PARTS.items() if name.startswith(prefix)), None)


@torch.no_grad()
def refresh_norms(model: nn.Module) -> None:
    """Computes every DoRA layer's norms anew and keeps them until the next call: once after each optimizer step.

    Where the weights are sharded (FSDP2) each rank computes its own rows; only A, and the norms, are gathered. A collective.
    """
    for layer in adapted(model).values():
        if layer.magnitude is not None and isinstance(layer, AdaptedLinear):
            layer.keep(_norms(layer))


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


@dataclass(frozen=True)
class Kept:
    """What `unmerge_adapters` needs: by the layers' names the layers with their adapters, and the base's weights and
    biases on the host."""

    layers: dict[str, tuple[nn.Module, dict[str, Tensor]]]
    names: list[str]
    usual: str | None
    brought: dict[str | None, Brought]


@one_at_a_time
@torch.no_grad()
def merge_adapters(model: Idefics2, name: str | None = None, *, keep: bool = False) -> None:
    """Writes g * (W + s B A) into the weights and takes the adapters off, in place. The products are made in fp32.

    Args:
        name: the adapter, where they have names; the others go with it.
        keep: adapters, and the base's weights in the host's memory, are kept for `unmerge_adapters`.

    Raises:
        ValueError: a model without adapters, or without this one; PEFT's `lora_bias` on a layer without a bias; a product that is
            beyond fp16.
    """
    layers, choice, kept = layers_of(model, name), model.choice, {}
    for place, layer in layers.items():
        if layer.shift is not None and layer.base.bias is None:
            raise ValueError(f"{place} has a bias of the adapter's (lora_bias), and none of its own: it cannot be merged")
        _require_fits(place, layer)
    for place, module in list(model.named_modules()):
        if not isinstance(module, Adapted | SwitchableLinear | SwitchableEmbedding) or ".adapters." in place:
            continue
        base, dtype = module.base, module.base.weight.dtype
        if keep:
            kept[place] = module, {key: tensor.detach().to("cpu", copy=True) for key, tensor in base.named_parameters()}
        if place in layers:
            base.float().weight.copy_(layers[place].weight)
            if layers[place].shift is not None:
                base.bias.copy_(layers[place].bias)
        model.set_submodule(place, base.to(dtype))
    model.kept = Kept(kept, list(choice.names), choice.usual, dict(choice.brought)) if keep else None
    choice.names.clear()
    choice.brought.clear()
    choice.usual = None


def _require_fits(place: str, layer: Adapted) -> None:
    """Refuses a layer in fp16 whose merged weight is beyond it, before any weight is written."""
    if (dtype := layer.base.weight.dtype) != torch.float16:
        return
    whole = copy.copy(layer)
    whole._modules = {**layer._modules, "base": copy.deepcopy(layer.base).float()}
    bound, largest = torch.finfo(dtype).max, whole.weight.abs().max().item()
    if not largest <= bound:
        raise ValueError(f"{place} would have a weight of {largest:g} merged, expected {bound:g} at most in fp16: use bfloat16 or float32")


@one_at_a_time
@torch.no_grad()
def unmerge_adapters(model: Idefics2) -> None:
    """Undoes `merge_adapters(model, keep=True)`, in place: the base has the bits that it had, and carries its adapters again.

    Raises:
        ValueError: nothing was merged, or it was not kept.
    """
    kept = model.kept
    if kept is None:
        raise ValueError("there is nothing to unmerge: expected merge_adapters(model, keep=True) before")
    for place, (module, tensors) in kept.layers.items():
        for key, tensor in tensors.items():
            module.base.get_parameter(key).copy_(tensor)
        model.set_submodule(place, module.to(module.base.weight.device))
    model.choice.names.extend(kept.names)
    model.choice.brought.update(kept.brought)
    model.choice.usual, model.kept = kept.usual, None
