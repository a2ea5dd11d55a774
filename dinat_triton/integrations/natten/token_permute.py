"""`natten.token_permute`: tokens of a map in the order of its tiles, one dilation group after the other."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from dinat_triton.integrations.natten.arguments import Refused

__all__ = ["token_permute_operation", "token_unpermute_operation"]

Ints = Sequence[int]


def token_permute_operation(
    tensor: Tensor,
    tile_shape: Ints,
    dilation: Ints | None = None,
    flip_tiled_dims: bool = True,
    use_torch: bool = True,
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Brings tokens of a tile together, and tiles of a residue class.

    Args:
        tensor: `[batch, *map, heads, dim]`. It is padded with zeros until tiles of every residue class are whole.
        tile_shape: Tokens of a tile along each axis.
        dilation: Residue classes on each axis; 1 by default.
        flip_tiled_dims: Whether the last axis is the slowest, among tiles and within.
        use_torch: Has no effect.

    Returns:
        `[batch * residue classes, tokens, heads, dim]`, the map's shape, and that of a padded residue class.
    """
    rank = tensor.dim() - 3
    if rank not in (1, 2, 3):
        raise Refused(f"tensor must be [batch, 1 to 3 map axes, heads, dim], got shape {tuple(tensor.shape)}")
    shape = tuple(tensor.shape[1:-2])
    dilations, tiles = _cut(shape, tile_shape, dilation)
    padding = [0, 0, 0, 0]
    for n, d, r, t in reversed(list(zip(shape, dilations, tiles, tile_shape, strict=True))):
        padding += [0, d * r * t - n]
    cut = torch.nn.functional.pad(tensor, padding).reshape(
        len(tensor), *(n for axis in zip(tiles, tile_shape, dilations, strict=True) for n in axis), *tensor.shape[-2:]
    )
    tokens = cut.permute(*_order(rank, flip_tiled_dims))
    class_shape = tuple(r * t for r, t in zip(tiles, tile_shape, strict=True))
    return tokens.reshape(-1, prod(class_shape), *tensor.shape[-2:]), shape, class_shape


def token_unpermute_operation(
    tensor: Tensor,
    token_layout_shape: Ints,
    tile_shape: Ints,
    dilation: Ints | None = None,
    flip_tiled_dims: bool = True,
    use_torch: bool = True,
) -> Tensor:
    """The inverse of `token_permute_operation`; `token_layout_shape` is the map's shape."""
    if tensor.dim() != 4:
        raise Refused(f"tensor must be [batch * residue classes, tokens, heads, dim], got shape {tuple(tensor.shape)}")
    rank = len(token_layout_shape)
    dilations, tiles = _cut(token_layout_shape, tile_shape, dilation)
    order = _order(rank, flip_tiled_dims)
    axes = [n for axis in zip(tiles, tile_shape, dilations, strict=True) for n in axis]
    cut = tensor.reshape(-1, *(axes[i - 1] for i in order[1:-2]), *tensor.shape[-2:])
    inverse = sorted(range(len(order)), key=order.__getitem__)
    padded = [d * r * t for d, r, t in zip(dilations, tiles, tile_shape, strict=True)]
    out = cut.permute(*inverse).reshape(-1, *padded, *tensor.shape[-2:])
    return out[(slice(None), *(slice(n) for n in token_layout_shape))].contiguous()


def _cut(shape: Ints, tile_shape: Ints, dilation: Ints | None) -> tuple[Ints, list[int]]:
    """Dilation and tiles of a residue class on each axis."""
    dilations = [1] * len(shape) if dilation is None else dilation
    for name, values in (("tile_shape", tile_shape), ("dilation", dilations)):
        if len(values) != len(shape) or min(values) < 1:
            raise Refused(f"{name} must be {len(shape)} positive integers, got {tuple(values)}")
    return dilations, [-(-n // (t * d)) for n, t, d in zip(shape, tile_shape, dilations, strict=True)]


def _order(rank: int, flip: bool) -> list[int]:
    """Axes (tiles, tile, dilation) of every map axis as dilations first, then tiles, then places in a tile."""
    axes: Any = range(rank)
    axes = list(reversed(axes)) if flip else list(axes)
    return [0, *(3 * a + part for part in (3, 1, 2) for a in axes), 3 * rank + 1, 3 * rank + 2]
