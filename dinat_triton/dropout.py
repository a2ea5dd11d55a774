"""Attention dropout that every backend can repeat: one Philox draw per (batch, head, query, key).

The mask depends on the seed and on the pair alone, so the backward recomputes it instead of storing it, and all
backends drop the same probabilities for the same seed. Triton's own `tl.philox` computes the same function.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def new_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator of that device, as a tensor so that drawing it never waits for the device."""
    return torch.randint(1 << 62, (1,), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """A pair is kept where its 32 random bits are at or above this."""
    return min(round(p * (1 << 32)), _WORD)


def keep_mask(seed: Tensor, p: float, key: Tensor, query: Tensor, batch_head: Tensor) -> Tensor:
    """True for pairs that survive dropout. Token indices and `batch * heads + head` broadcast against each other."""
    return philox(seed, key, query, batch_head) >= threshold(p)


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """First output word of Philox 4x32-10 with counter (c0, c1, c2, 0), as int64 in [0, 2**32)."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c3: Tensor | int = 0
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # the low 64 bits, whatever their sign
        c0, c1 = ((product1 >> 32) & _WORD) ^ c1 ^ k0, product1 & _WORD
        c2, c3 = ((product0 >> 32) & _WORD) ^ c3 ^ k1, product0 & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0
