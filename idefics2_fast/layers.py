"""The pieces that vision tower, connector and language model share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idefics2_fast import ops

# Rows of row-wise work done at a time without gradients: 512 x 14336 fp32 is 28 MiB, near a CPU's last-level cache.
ROWS = 512
# The first row of the block that `by_rows` has handed out, for what does not treat all rows alike.
first_row: ContextVar[int] = ContextVar("first_row", default=0)


# DoRA's norms by layer: of a call while the weights stay as they are.
Norms = Mapping[nn.Module, Tensor]


@dataclass(frozen=True, eq=False)
class Route:
    """The named adapters of one call's rows, and what the call has derived from its adapters. None stands for the base alone.

    It is handed from layer to layer, so calls in several threads, and layers that are computed
    again for their gradients, each find their own.

    Attributes:
        runs: neighbouring rows with one adapter, and how many they are. One run alone stands for any number of rows.
        norms: DoRA's norms by layer, for as long as the weights stay as they are; None where each pass computes its own.
    """

    runs: tuple[tuple[str | None, int], ...]
    norms: Norms | None = None

    @classmethod
    def of(cls, names: Sequence[str | None], lengths: Sequence[int], norms: Norms | None = None) -> Route:
        """The route of segments of these lengths, each with its adapter; no names for the base."""
        runs = groupby(zip(names, lengths, strict=True) if names else (), key=lambda pair: pair[0])
        return cls(tuple((name, sum(rows for _, rows in run)) for name, run in runs) or ((None, 0),), norms)

    @property
    def only(self) -> bool:
        """Whether all rows take one adapter."""
        return len(self.runs) == 1

    def within(self, rows: int) -> Sequence[tuple[str | None, int]]:
        """The adapters of the rows that are in view, and how many neighbours take each: `rows` in all."""
        if self.only:
            return [(self.runs[0][0], rows)]
        total = sum(count for _, count in self.runs)
        in_parts = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        assert rows == total or in_parts, f"{rows} rows, but adapters are chosen for {total}"
        start, end, seen = first_row.get(), first_row.get() + rows, []
        for name, count in self.runs:
            if (inside := min(end, count) - max(start, 0)) > 0:
                seen.append((name, inside))
            start, end = start - count, end - count
        assert sum(count for _, count in seen) == rows, f"{rows} rows in view, of {total}"
        return seen


# Of a layer that is called without a route: the base where adapters have names.
BASE = Route(((None, 0),))


@dataclass
class Brought:
    """Weights that came, or were trained, with an adapter beside its layers, by Hugging Face's names.

    Attributes:
        tensors: trained whole.
        rows: of tables of which some rows are trained, their indices.
    """

    tensors: frozenset[str] = frozenset()
    rows: Mapping[str, Sequence[int]] = field(default_factory=dict)


class Choice:
    """The adapters that a model carries.

    Attributes:
        names: of those that have one.
        usual: the adapter of batches that do not say; None for the base alone.
        brought: what each, or the one without a name, brought beside its layers.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.usual: str | None = None
        self.brought: dict[str | None, Brought] = {}

    def of(self, adapters: Sequence[str | None], documents: int) -> tuple[str | None, ...]:
        """The adapter of each document, which is the usual one where none are asked for; () where none has a name.

        Raises:
            ValueError: an adapter that the model does not carry.
        """
        for name in adapters:
            if not self.names or name not in (*self.names, None):
                carried = ", ".join(self.names) or "none with a name"
                raise ValueError(f"a document asks for adapter {name!r}, the model carries {carried}")
        return tuple(adapters) or (self.usual,) * (documents if self.names else 0)


class Linear(nn.Linear):
    """nn.Linear whose product goes through `ops.linear`. Input [T, in], output [T, out]."""

    def forward(self, x: Tensor, route: Route = BASE) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def matrix(self, route: Route = BASE) -> Tensor:
        """The matrix [out, in] of rows that all take one adapter: for what takes the matrix itself."""
        return self.weight

    def reset_parameters(self) -> None:
        """Nothing: the model draws its weights itself, or reads them."""


class Embedding(nn.Embedding):
    """nn.Embedding without weights of its own making, through `ops.embedding`: features may take some rows' place, noise may be added."""

    def forward(
        self,
        ids: Tensor,
        features: Tensor | None = None,
        feature_rows: Tensor | None = None,
        noise: ops.Noise | None = None,
        route: Route = BASE,
    ) -> Tensor:
        return ops.embedding(ids, self.weight, features, feature_rows, noise, padding_idx=self.padding_idx)

    def reset_parameters(self) -> None:
        """Nothing: the model draws its weights itself, or reads them."""


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis of [T, C], its mean in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up as the upper and lower rows of one matrix."""

    def __init__(self, hidden: int, intermediate: int, output: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden, 2 * intermediate, bias=False)
        self.down_proj = Linear(intermediate, output, bias=False)

    def forward(self, x: Tensor, route: Route = BASE) -> Tensor:
        gate, up = self.gate_up_proj(x, route).chunk(2, dim=-1)
        if torch.is_grad_enabled():
            return self.down_proj(F.silu(gate) * up, route)
        return self.down_proj(F.silu(gate).mul_(up), route)


def add(residual: Tensor, branch: Tensor) -> Tensor:
    """residual + branch; without gradients in the residual's own memory, which must belong to the caller."""
    return residual + branch if torch.is_grad_enabled() else residual.add_(branch)


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) for a function that treats every row alone. Without gradients on a CPU, in blocks of rows that stay in cache."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.shape[0] <= ROWS:
        return function(x)
    first = function(x[:ROWS])
    out = first.new_empty(x.shape[0], *first.shape[1:])
    out[:ROWS] = first
    for start in range(ROWS, x.shape[0], ROWS):
        with nullcontext() if torch.compiler.is_compiling() else _first_row_at(start):
            out[start : start + ROWS] = function(x[start : start + ROWS])
    return out


@contextmanager
def _first_row_at(start: int) -> Iterator[None]:
    """`first_row` within the block. The compiler knows no such variables; `Route.within` refuses parts of the rows there."""
    before = first_row.set(start)
    try:
        yield
    finally:
        first_row.reset(before)
