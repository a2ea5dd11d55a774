"""Forms in which query, key and value travel: as three tensors, or as one that packs them before its heads axis.

A key mask, `[batch, *shape]` with True where the key may be seen, comes behind them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_mask(tensors: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    """Query, key and value as they travel, and the key mask."""
    return (tensors[:-1], tensors[-1]) if len(tensors) % 2 == 0 else (tensors, None)


def unpack_grads(grads: list[Tensor | None]) -> list[Tensor | None]:
    """Room for the gradients of query, key and value; None for those that nobody wants."""
    packed = grads[0]
    return grads if len(grads) == 3 or packed is None else [*packed.unbind(-3)]


def unpack(tensors: list[Tensor]) -> list[Tensor]:
    """Query, key and value, each `[batch, *shape, heads, dim]`."""
    return tensors[:3] if len(tensors) >= 3 else list(tensors[0].unbind(-3))


def hide_keys(qkv: list[Tensor], key_mask: Tensor) -> list[Tensor]:
    """Puts zeros into the hidden keys and values, so that not even a NaN of theirs gets anywhere."""
    shown = key_mask[..., None, None]
    if len(qkv) == 3:
        return [qkv[0], *(x.where(shown, 0) for x in qkv[1:])]
    is_query = torch.tensor([True, False, False], device=key_mask.device)[:, None, None]
    return [qkv[0].where(shown[..., None] | is_query, 0)]
