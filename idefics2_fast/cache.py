"""Key/value cache: every sequence owns a run of rows, allocated once, in one flat tensor a layer. No padding between sequences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from idefics2_fast import ops
from idefics2_fast.config import TextConfig
from idefics2_fast.kernels.segments import Segments
from idefics2_fast.language import Attend, rotary_table


class KVCache:
    """Keys and values of D sequences of different lengths.

    Args:
        config: the language model's shape.
        capacities: tokens that each of the D sequences may come to hold.
        dtype, device: of the model.

    Attributes:
        k, v: [layers, R, M, H] for R rows of all sequences, M key/value heads, H head dim.
        starts: int64 [D], first row of each sequence.
        lengths: int64 [D], rows in use.
    """

    def __init__(self, config: TextConfig, capacities: Sequence[int], *, dtype: torch.dtype, device: torch.device | str) -> None:
        page = ops.PAGE if torch.device(device).type == "cuda" else 1
        regions = [-(-capacity // page) * page for capacity in capacities]
        starts = list(accumulate(regions, initial=0))
        shape = (config.num_hidden_layers, starts[-1], config.num_key_value_heads, config.head_dim)
        # zeros, not whatever memory holds: a masked row still meets a weight of 0, and 0 times NaN is NaN
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.starts = torch.tensor(starts[:-1], device=device)
        self.lengths = torch.zeros_like(self.starts)
        self.capacities = torch.tensor(capacities, device=device)
        self.longest = max(regions)
        self.window, self.scale = config.sliding_window, config.head_dim**-0.5
        positions = torch.arange(self.longest, device=device)
        self.cos, self.sin = rotary_table(positions, config.head_dim, config.rope_theta, dtype)

    def prefill(self, documents: Segments) -> Attend:
        """Attention of whole documents, which become the cache's sequences."""
        starts = self.starts.tolist()
        rows = torch.cat([torch.arange(start, start + length) for start, length in zip(starts, documents.lengths, strict=True)])
        rows = rows.to(self.k.device)
        self.lengths.copy_(documents.offsets.diff())

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(layer, rows, k, v)
            return ops.segment_attention(q, k, v, documents, causal=True, window=self.window, scale=self.scale)

        return attend

    def decode(self, sequences: Tensor) -> Attend:
        """Attention of one new token for each of `sequences` (int64 [d]), which it appends.

        Shapes depend on d and on the cache alone, and nothing waits for the device: the step can be captured in a CUDA graph. A
        full sequence overwrites its last row, so that finished ones may ride along.
        """
        starts = self.starts.index_select(0, sequences)
        lengths = self.lengths.index_select(0, sequences)
        rows = starts + torch.minimum(lengths, self.capacities.index_select(0, sequences) - 1)
        slots = ops.Slots(starts, rows - starts + 1, self.longest)
        self.lengths.index_copy_(0, sequences, slots.lengths)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(layer, rows, k, v)
            return ops.decode_attention(q, self.k[layer], self.v[layer], slots, window=self.window, scale=self.scale)

        return attend

    def rotary(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """The rotary table of the next position of each of `sequences` (int64 [d])."""
        positions = self.lengths.index_select(0, sequences).clamp_(max=self.longest - 1)
        return self.cos.index_select(0, positions), self.sin.index_select(0, positions)

    def _write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        self.k[layer].index_copy_(0, rows, k)
        self.v[layer].index_copy_(0, rows, v)
