"""Batches of maps of different sizes.

They come padded, `[batch, *shape, ...]` with each map in the top left corner of its batch item, or packed, `[tokens of
all maps, ...]` with each map in row-major order after the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from math import prod
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import pad

from dinat_triton.geometry import Geometry, broadcast_ints, geometry_of, rank_of, row_major_strides

Size = tuple[int, ...]
# Batches whose geometries are kept: a new one takes a few microseconds for each of its maps.
MOST_BATCHES = 64


def has_sizes(sizes: Any) -> TypeGuard[list[list[int]]]:
    """Whether sizes were given. A tracer passes a proxy for those that were not."""
    return sizes is not None and not isinstance(sizes, torch.fx.Proxy)


def flat_sizes(sizes: Sequence[int | Sequence[int]], rank: int) -> list[int]:
    """The axes of all maps, one after the other; an integer holds for all axes of a map."""
    if not isinstance(sizes, (list, tuple)):
        raise TypeError(f"sizes must be a list with a shape for each map, got {sizes!r}")
    return [n for i, size in enumerate(sizes) for n in broadcast_ints(f"sizes[{i}]", size, rank)]


def check_sizes(lead: Sequence[int], sizes: Sequence[int | Sequence[int]], rank: int) -> list[Size]:
    """One shape for each of the maps that a tensor's first axes hold: `[batch, *shape]`, or `[tokens]`."""
    found = _by_rank(flat_sizes(sizes, rank), rank)
    check_lead(lead, found)
    return found


def _by_rank(flat: Sequence[int], rank: int) -> list[Size]:
    if not flat or len(flat) % rank != 0:
        raise ValueError(f"sizes must have a shape of {rank} integers for each of at least one map, got {flat}")
    return [tuple(flat[i : i + rank]) for i in range(0, len(flat), rank)]


def check_lead(lead: Sequence[int], sizes: Sequence[Size]) -> None:
    """Checks that maps of these sizes are what a tensor's first axes hold: `[batch, *shape]`, or `[tokens]`."""
    if len(lead) == 1:
        total = sum(map(prod, sizes))
        if lead[0] != total:
            raise ValueError(f"sizes must add up to the {lead[0]} tokens that are packed, got {total} of {sizes}")
        return
    batch, *shape = lead
    if len(sizes) != batch:
        raise ValueError(f"sizes must have one shape for each of {batch} batch items, got {len(sizes)}: {sizes}")
    for i, size in enumerate(sizes):
        if any(n > most for n, most in zip(size, shape, strict=True)):
            raise ValueError(f"sizes must fit the map they are padded to, {tuple(shape)}, got {size} for item {i}")


def split_maps(x: Tensor, sizes: Sequence[Size], packed: bool) -> list[Tensor]:
    """Views of the maps of a batch, `[1, *size, ...]` each."""
    if packed:
        parts = x.split([prod(size) for size in sizes])
        return [part.unflatten(0, (1, *size)) for part, size in zip(parts, sizes, strict=True)]
    corners = [tuple(slice(n) for n in size) for size in sizes]
    return [item[corner].unsqueeze(0) for item, corner in zip(x.unbind(), corners, strict=True)]


def join_maps(maps: Sequence[Tensor], rank: int, shape: Sequence[int] | None = None) -> Tensor:
    """A batch of maps, padded to a shape with zeros, or packed."""
    if shape is None:
        return torch.cat([x.flatten(0, rank) for x in maps])
    return torch.cat([pad_map(x, shape) for x in maps])


def clear_padding(x: Tensor, sizes: Sequence[Size]) -> Tensor:
    """Padded maps `[batch, *shape, ...]` with zeros around them, whatever was there."""
    rank = len(sizes[0])
    return join_maps(split_maps(x, sizes, False), rank, x.shape[1 : 1 + rank])


def pad_map(x: Tensor, shape: Sequence[int]) -> Tensor:
    """A map `[1, *size, ...]` with zeros at the end of each axis that is shorter."""
    missing = [m - n for n, m in zip(x.shape[1:], shape, strict=False)]
    if not any(missing):
        return x
    return pad(x, [0, 0] * (x.ndim - 1 - len(missing)) + [n for m in missing[::-1] for n in (0, m)])


def crop_map(x: Tensor, size: Size) -> Tensor:
    """A map without what `pad_map` added."""
    return x[(slice(None), *map(slice, size))]


@dataclass(frozen=True, eq=False)
class MapBatch:
    """The problem of a batch of maps.

    Attributes:
        geometries: Of each map.
        shape: That maps are padded to; None if they are packed.
    """

    geometries: tuple[Geometry, ...]
    shape: Size | None

    @cached_property
    def sizes(self) -> list[Size]:
        return [geometry.shape for geometry in self.geometries]

    @cached_property
    def largest(self) -> Geometry:
        """Geometry of the map with the most tokens."""
        return max(self.geometries, key=lambda geometry: geometry.num_tokens)

    @property
    def num_offsets(self) -> int:
        return self.geometries[0].num_offsets

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole batch, padding included."""
        if self.shape is None:
            return sum(geometry.num_tokens for geometry in self.geometries)
        return len(self.geometries) * prod(self.shape)

    def by_size(self) -> list[tuple[Geometry, Size, tuple[int, ...]]]:
        """Each size's geometry, its token strides, and the first token of every map that has it, counted over all."""
        counts = [geometry.num_tokens if self.shape is None else prod(self.shape) for geometry in self.geometries]
        firsts: dict[Geometry, list[int]] = {}
        for geometry, first in zip(self.geometries, accumulate(counts, initial=0), strict=False):
            firsts.setdefault(geometry, []).append(first)
        strides = None if self.shape is None else row_major_strides(self.shape)
        return [(geometry, strides or geometry.token_strides, tuple(own)) for geometry, own in firsts.items()]

    def problems(
        self, tensors: Sequence[Tensor], seed: Tensor | None
    ) -> Iterator[tuple[Geometry, list[Tensor], Tensor | None]]:
        """Each map's geometry, its part of the tensors, and a seed of its own for its dropout."""
        parts = [split_maps(x, self.sizes, self.shape is None) for x in tensors]
        for i, (geometry, *own) in enumerate(zip(self.geometries, *parts, strict=True)):
            yield geometry, own, None if seed is None else seed + i

    def join(self, results: Sequence[Tensor]) -> Tensor:
        """Joins what maps gave, in the form that they came in."""
        return join_maps(results, len(self.sizes[0]), self.shape)

    def each(
        self, of_one: Callable[..., tuple[Tensor, Tensor]], qkv: Sequence[Tensor], seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp, where there is one, of a function that attends on one map at a time."""
        results = [of_one(own, geometry, own_seed) for geometry, own, own_seed in self.problems(qkv, seed)]
        outs, lses = zip(*results, strict=True)
        return self.join(outs), self.join(lses) if lses[0].numel() > 0 else lses[0]


@lru_cache(maxsize=MOST_BATCHES)
def map_batch_of(lead: Size, window: tuple[int, ...], flat: tuple[int, ...]) -> MapBatch:
    """The batch that tensors with these first axes hold; `flat` are the axes of all sizes, one after the other."""
    rank = rank_of(window)
    sizes = _by_rank(flat, rank)
    check_lead(lead, sizes)
    geometries = []
    for i, size in enumerate(sizes):
        try:
            geometries.append(geometry_of(size, window))
        except ValueError as error:
            raise ValueError(f"{error} (item {i} of sizes)") from None
    return MapBatch(tuple(geometries), None if len(lead) == 1 else lead[1:])
