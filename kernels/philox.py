"""Random numbers by counter: Philox4x32-10, so that a number depends on what it is for and on nothing else.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011); the words are those of Random123 and of Triton's
`tl.philox`. Plain integer arithmetic: every device gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# Counters at a time: 64-bit words of so many counters stay in the last-level cache, and two threads share them.
BLOCK = 1 << 17


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter.

    Args:
        counter: four words of 32 bits, as int64 tensors of shapes that broadcast to one another.
        key: two words of 32 bits.

    Returns:
        Four int32 tensors of the broadcast shape: the words' bits.
    """
    c0, c1, c2, c3 = (word & MASK for word in counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        # 64-bit products wrap around; their lower halves stay below garbage, which the mask removes before the next product.
        low, high = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = ((high >> 32) ^ (c1 ^ k0)) & MASK, ((low >> 32) ^ (c3 ^ k1)) & MASK
        c1, c3 = high, low
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return tuple(word.to(torch.int32) for word in (c0, c1, c2, c3))


def uniform(seed: int, step: int, tokens: Tensor, width: int) -> Tensor:
    """Numbers from U(-1, 1) for rows of `width`, fixed by (seed, step, token, column) alone.

    The key is the seed, the counter (column // 4, lower and upper half of the token index, step); column 4i + j takes word j, as a signed
    integer over 2^31.

    Args:
        seed: 64 bits.
        step: 32 bits.
        tokens: int64 [T], indices of any size.

    Returns:
        fp32 [T, width].
    """
    blocks = -(-width // 4)
    columns = torch.arange(blocks, device=tokens.device)
    out = torch.empty(tokens.shape[0], blocks, 4, device=tokens.device)
    rows = max(1, BLOCK // blocks)
    for start in range(0, tokens.shape[0], rows):
        token = tokens[start : start + rows, None]
        words = philox((columns, token, token >> 32, torch.full_like(columns[:1], step)), (seed & MASK, seed >> 32 & MASK))
        for j, word in enumerate(words):
            out[start : start + rows, :, j] = word
    return out.mul_(2.0**-31).flatten(1)[:, :width]
