"""NEFTune: noise on token embeddings in training, scaled by each document's own length.

    y = x + u * alpha / sqrt(L * C),   u from U(-1, 1), L the length of the token's document, C the width

Source: arXiv 2310.05914 and its authors' code, where L is the length without padding. The noise is counter-based (`kernels/philox.py`): it
depends on (seed, step, global token index, column), so it is the same in every split of a batch, on any device, and when recomputed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from idefics2_fast.kernels.philox import uniform


def reference(x: Tensor, lengths: Tensor, tokens: Tensor, *, alpha: float, seed: int, step: int, noise: Tensor | None = None) -> Tensor:
    """The formula in fp32 (fp64 for fp64), rounded once.

    Args:
        x: embeddings [T, C].
        lengths: [T], of each token's document; 0 leaves a token without noise, as padding is.
        tokens: int64 [T], global indices.
        seed, step: what the noise is drawn for.
        noise: [T, C], taken in place of drawn numbers.

    Returns:
        [T, C] in the dtype of `x`; its gradient passes to `x` as it is.

    Raises:
        ValueError: shapes that do not belong together.
    """
    rows, width = x.shape
    if lengths.shape != (rows,) or tokens.shape != (rows,):
        raise ValueError(f"lengths {list(lengths.shape)} and tokens {list(tokens.shape)}, expected [{rows}] as the rows of x")
    dtype = torch.promote_types(x.dtype, torch.float32)
    lengths = lengths.to(dtype)
    scale = torch.where(lengths > 0, alpha / (lengths * width).sqrt(), 0.0)
    noise = uniform(seed, step, tokens, width) if noise is None else noise
    return (x.to(dtype) + noise * scale[:, None]).to(x.dtype)
