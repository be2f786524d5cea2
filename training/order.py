"""Chance and order: what the run's seed, the epoch and a sample's key alone decide.

Nothing here has a state. A sample meets the same fortune on any rank, in any worker thread, and after any resumption.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

WINDOW = 1024  # rows


def uniform(*parts: str | int) -> float:
    """A number in [0, 1) that the parts alone decide: 53 bits of a BLAKE2b digest."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def permutation(n: int, *parts: str | int) -> np.ndarray:
    """int64 [n], the numbers below n in an order that the parts alone decide."""
    key = np.frombuffer(hashlib.blake2b(repr(parts).encode(), digest_size=16).digest(), dtype="<u8")
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


class RowsInOrder:
    """Every row once an epoch, in the source's own order."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(epoch, row) of a position in the endless stream of samples."""
        return divmod(position, self._rows)


class ShuffledRows:
    """Every row once an epoch, in an order that is another one in each epoch.

    Blocks of rows that are cheap to read together (row groups) are shuffled. Then the rows are, within windows of neighbouring blocks, so
    that a reader which holds the last few blocks reads each of them once. Blocks of one row make it a shuffle of all rows.

    Args:
        blocks: int64 [B], the lengths of the blocks of rows, in the order of the source.
    """

    def __init__(self, blocks: np.ndarray, seed: int, window: int = WINDOW) -> None:
        self.first_rows = np.concatenate([[0], np.cumsum(blocks)])
        self.seed, self.window = seed, window
        self._blocks_of_epoch = functools.lru_cache(maxsize=2)(self._shuffle_blocks)
        self._rows_of_window = functools.lru_cache(maxsize=16)(permutation)

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(epoch, row) of a position in the endless stream of samples."""
        epoch, place = divmod(position, len(self))
        order, starts = self._blocks_of_epoch(epoch)
        number = int(starts[np.searchsorted(starts, place, side="right") - 1]) // self.window
        first, last = np.searchsorted(starts, [number * self.window, (number + 1) * self.window])
        begin, end = int(starts[first]), int(starts[last]) if last < len(starts) else len(self)
        place = begin + int(self._rows_of_window(end - begin, self.seed, epoch, "rows", number)[place - begin])
        block = int(np.searchsorted(starts, place, side="right")) - 1
        return epoch, int(self.first_rows[order[block]]) + place - int(starts[block])

    def _shuffle_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the blocks, and where in the epoch each begins."""
        order = permutation(len(self.first_rows) - 1, self.seed, epoch, "blocks")
        ends = np.cumsum(np.diff(self.first_rows)[order])
        return order, np.concatenate([[0], ends[:-1]])
