"""The pieces that vision tower, connector and language model share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idefics2_fast import ops

# Rows of row-wise work done at a time without gradients: 512 x 14336 fp32 is 28 MiB, near a CPU's last-level cache.
ROWS = 512
# The first row of the block that `by_rows` has handed out, for what does not treat all rows alike.
first_row: ContextVar[int] = ContextVar("first_row", default=0)


class Choice:
    """Which of a model's named adapters the rows of the next pass take. None stands for the base alone.

    It holds until it is set anew, so that text layers that are computed again for their gradients find it as it was.

    Attributes:
        names: of the adapters that the model carries.
        usual: the adapter of all rows where nobody says otherwise.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.usual: str | None = None
        self._runs: list[tuple[str | None, int]] = []  # neighbours with one adapter, and how many rows they are; none for the usual

    def set(self, names: Sequence[str | None] = (), lengths: Sequence[int] = ()) -> None:
        """The adapters of the next pass' segments, and the segments' lengths; no names for the usual adapter.

        Raises:
            ValueError: an adapter that the model does not carry.
        """
        for name in names:
            if not self.names or name not in (*self.names, None):
                raise ValueError(f"a document asks for adapter {name!r}, the model carries {', '.join(self.names) or 'none with a name'}")
        pairs = groupby(zip(names, lengths, strict=True) if names else (), key=lambda pair: pair[0])
        self._runs = [(name, sum(rows for _, rows in run)) for name, run in pairs]

    @property
    def only(self) -> bool:
        """Whether all rows take one adapter."""
        return len(self._runs) < 2

    def runs(self, rows: int) -> list[tuple[str | None, int]]:
        """The adapters of the rows that are in view, and how many neighbours take each: `rows` in all."""
        if self.only:
            return [(self._runs[0][0] if self._runs else self.usual, rows)]
        total = sum(count for _, count in self._runs)
        in_parts = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        assert rows == total or in_parts, f"{rows} rows, but adapters are chosen for {total}"
        start, end, seen = first_row.get(), first_row.get() + rows, []
        for name, count in self._runs:
            if (inside := min(end, count) - max(start, 0)) > 0:
                seen.append((name, inside))
            start, end = start - count, end - count
        assert sum(count for _, count in seen) == rows, f"{rows} rows in view, of {total}"
        return seen


class Linear(nn.Linear):
    """nn.Linear whose product goes through `ops.linear`. Input [T, in], output [T, out]."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def reset_parameters(self) -> None:
        """Nothing: the model draws its weights itself, or reads them."""


class Embedding(nn.Embedding):
    """nn.Embedding without weights of its own making, through `ops.embedding`: features may take some rows' place, noise may be added."""

    def forward(
        self, ids: Tensor, features: Tensor | None = None, feature_rows: Tensor | None = None, noise: ops.Noise | None = None
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

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        if torch.is_grad_enabled():
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(F.silu(gate).mul_(up))


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
    """`first_row` within the block. The compiler knows no such variables; `Choice.runs` refuses parts of the rows there."""
    before = first_row.set(start)
    try:
        yield
    finally:
        first_row.reset(before)
