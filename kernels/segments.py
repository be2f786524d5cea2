"""Segments: how documents and images stand one after another on a packed axis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The borders of S segments on a packed axis, known on both sides.

    Attributes:
        offsets: int32 [S + 1] on the device of the data (flash-attention's `cu_seqlens`); starts with 0, never falls.
        bounds: the same numbers on the host, so that no kernel launch waits for the device.
    """

    offsets: Tensor
    bounds: tuple[int, ...]

    @classmethod
    def of_lengths(cls, lengths: Iterable[int], device: torch.device | str = "cpu") -> Segments:
        """Segments of the given lengths, each 0 or more."""
        bounds = tuple(accumulate(lengths, initial=0))
        if any(end < start for start, end in pairwise(bounds)):
            raise ValueError(f"segment lengths must not be negative, got borders {bounds}")
        return cls(torch.tensor(bounds, dtype=torch.int32, device=device), bounds)

    @classmethod
    def of_offsets(cls, offsets: Tensor | Sequence[int]) -> Segments:
        """Segments with the given borders [S + 1]. A tensor on a GPU is copied to the host once, here.

        Raises:
            ValueError: the borders do not start with 0, or fall.
        """
        offsets = torch.as_tensor(offsets)
        bounds = tuple(offsets.tolist()) if offsets.ndim == 1 else ()
        if not bounds or bounds[0] != 0 or any(end < start for start, end in pairwise(bounds)):
            raise ValueError(f"offsets must be a rising list that starts with 0, got {offsets.tolist()}")
        return cls(offsets.to(torch.int32), bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def lengths(self) -> list[int]:
        return [end - start for start, end in pairwise(self.bounds)]

    @property
    def total(self) -> int:
        return self.bounds[-1]

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def to(self, device: torch.device | str) -> Segments:
        return Segments(self.offsets.to(device, non_blocking=True), self.bounds)
