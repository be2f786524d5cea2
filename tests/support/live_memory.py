"""What the tensors alive hold, as it goes up and down."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors made in a `with` block that have an axis of one of some sizes, and the most that there were at one time.

    What an op's own code takes for itself while it runs is not seen.
    """

    def __init__(self, sizes: Collection[int]) -> None:
        super().__init__()
        self.sizes, self.live, self.peak = frozenset(sizes), 0, 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self.sizes & set(tensor.shape):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) not in self._alive:
            self._alive.add(key)
            weakref.finalize(storage, self._forget, key, storage.nbytes())
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.live -= size
