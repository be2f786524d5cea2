"""What an execution did: instructions, bytes and segments, as a profiler on a card would count them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np


@dataclass
class Counts:
    """Sums over the executed CTAs.

    Attributes:
        ctas: how many ran.
        instructions: opcode with its modifiers -> warps that issued it. `lines` has the same by line of the PTX.
        requested: (direction, argument, bytes per thread) -> bytes of the threads that were on; the direction is load, store, atomic,
            copy (cp.async), or tma_load and tma_store (which count the box's bytes inside the tensor, with 0 per thread).
        segments: (direction, argument) -> 128-byte segments, distinct within each access of a warp.
        shared: (direction, bytes per thread) -> bytes.
        bank_conflicts: passes of shared memory beyond the fewest that the bytes of an access need.
        flops: of tensor cores, two for each multiply-add, by instruction shape.
    """

    ctas: int = 0
    instructions: Counter[str] = field(default_factory=Counter)
    lines: Counter[int] = field(default_factory=Counter)
    requested: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    segments: Counter[tuple[str, str]] = field(default_factory=Counter)
    shared: Counter[tuple[str, int]] = field(default_factory=Counter)
    bank_conflicts: int = 0
    flops: Counter[str] = field(default_factory=Counter)

    def bytes(self, *directions: str, argument: str | None = None) -> int:
        """Global bytes requested in these directions (default: all), of one argument or of all."""
        return sum(n for (way, name, _), n in self.requested.items() if (not directions or way in directions) and argument in (None, name))

    def widths(self, *directions: str) -> Counter[int]:
        """Bytes per thread and access -> bytes requested."""
        total: Counter[int] = Counter()
        for (way, _, width), n in self.requested.items():
            if not directions or way in directions:
                total[width] += n
        return total

    def kinds(self) -> Counter[str]:
        """Instructions by the opcode's first part."""
        total: Counter[str] = Counter()
        for opcode, n in self.instructions.items():
            total[opcode.split(".")[0]] += n
        return total

    def __add__(self, other: Counts) -> Counts:
        mine, theirs = vars(self), vars(other)
        return Counts(**{name: mine[name] + theirs[name] for name in mine})


def distinct_segments(addresses: np.ndarray, on: np.ndarray | None) -> int:
    """128-byte segments of int64 addresses [lanes], distinct within each warp."""
    segments = addresses >> 7
    if on is not None:
        segments = np.where(on, segments, -1)
    segments = np.sort(segments.reshape(-1, 32), axis=1)
    distinct = np.count_nonzero(segments[:, 1:] != segments[:, :-1]) + segments.shape[0]
    return int(distinct) if on is None else int(distinct - np.count_nonzero(segments[:, 0] == -1))


def excess_passes(addresses: np.ndarray, on: np.ndarray | None, size: int) -> int:
    """Passes of the 32 banks of 4 bytes beyond the fewest.

    A warp's access runs in phases of 128 bytes: 32 threads of up to 4 bytes, 16 of 8, 8 of 16. Each phase needs as many passes as the
    busiest bank has distinct words; threads that read one word share it.
    """
    if on is not None and not on.any():
        return 0
    lowest = addresses.min() if on is None else addresses[on].min()
    relative = addresses - (lowest & -128)
    if on is not None:
        relative = np.where(on, relative, OFF)
    return _excess_passes(relative.astype(np.int32).tobytes(), size)


OFF = -128
"""In the place of the address of a thread that is off."""


@lru_cache(maxsize=4096)
def _excess_passes(addresses: bytes, size: int) -> int:
    """Cached: a pattern comes back in every iteration, shifted by whole rows of banks."""
    threads = 128 // max(size, 4)
    words = (np.frombuffer(addresses, np.int32)[:, None] >> 2) + np.arange(max(size // 4, 1))
    words = np.sort(words.reshape(-1, threads * words.shape[1]), axis=1)
    fresh = words >= 0
    fresh[:, 1:] &= words[:, 1:] != words[:, :-1]
    phase = np.broadcast_to(np.arange(words.shape[0])[:, None], words.shape)
    load = np.bincount((phase * 32 + words % 32)[fresh], minlength=32 * words.shape[0]).reshape(-1, 32).max(1)
    return int(np.maximum(load - 1, 0).sum())
