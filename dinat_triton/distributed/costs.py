"""Bytes that an attention over a sharded map moves, and the scheme that moves least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import product

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from dinat_triton.distributed.exchange import moved
from dinat_triton.distributed.shares import CLASSES, HALO, WHOLE, chunks, shares
from dinat_triton.geometry import Axis, Geometry, IntArray, broadcast_ints


@dataclass(frozen=True)
class Token:
    """Bytes of one token of the whole batch: of its query, of its key, value and mask, and of its outputs."""

    query: int
    key_value: int
    out: int


@dataclass(frozen=True, eq=False)
class CommunicationCost:
    """Bytes that a forward moves between ranks. Its backward moves as much the other way.

    Attributes:
        schemes: For each map axis "halo", "classes", or "whole" where one rank has all of it.
        received: Bytes that each rank receives, one axis for each of the map's.
        alternatives: Bytes that the busiest rank would receive, by schemes; these are among them.
    """

    schemes: tuple[str, ...]
    received: IntArray
    alternatives: dict[tuple[str, ...], int]

    @property
    def busiest(self) -> int:
        """Bytes that the busiest rank receives: the others wait for it."""
        return int(self.received.max())

    @property
    def total(self) -> int:
        """Bytes that all ranks receive together."""
        return int(self.received.sum())


def cost(
    geometry: Geometry,
    mesh: DeviceMesh | int | Sequence[int],
    *,
    batch: int = 1,
    heads: int = 1,
    dim: int = 32,
    kv_heads: int | None = None,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    return_lse: bool = False,
    has_key_mask: bool = False,
) -> CommunicationCost:
    """Bytes that the attention will move between ranks in a forward, by the scheme that it will take.

    Args:
        geometry: The whole map and its windows.
        mesh: Ranks along the map's axes, those of the first axes first; a mesh cuts one axis with each dimension.
        batch: Maps on a rank.
        heads: Query heads on a rank.
        dim: Channels of a head.
        kv_heads: Heads of keys and values; those of the queries by default.
        value_dim: Channels of a value; those of a key by default.
        dtype: Of the tensors.
        return_lse: Whether the log-sum-exp is returned too.
        has_key_mask: Whether keys are masked; each then has a channel more.
    """
    of_token = token(batch, heads, dim, kv_heads or heads, value_dim or dim, dtype, return_lse, has_key_mask)
    return cheapest(geometry, ranks_along(geometry, mesh), of_token)


@lru_cache(maxsize=512)
def cheapest(geometry: Geometry, ranks: tuple[int, ...], token: Token) -> CommunicationCost:
    """The cost of the scheme that keeps the busiest rank least busy."""
    options = [(WHOLE,) if n == 1 else (HALO, CLASSES) for n in ranks]
    received = {schemes: _received(geometry, ranks, token, schemes) for schemes in product(*options)}
    best = min(received, key=lambda schemes: (received[schemes].max(), received[schemes].sum()))
    return CommunicationCost(best, received[best], {schemes: int(each.max()) for schemes, each in received.items()})


def ranks_along(geometry: Geometry, mesh: DeviceMesh | int | Sequence[int]) -> tuple[int, ...]:
    """Ranks along each axis of a map."""
    given = mesh.shape if isinstance(mesh, DeviceMesh) else (mesh,) if isinstance(mesh, int) else tuple(mesh)
    if len(given) > geometry.rank:
        raise ValueError(f"mesh must have at most one dimension per axis of the map {geometry.shape}, got {given}")
    return broadcast_ints("mesh", (*given, *(1,) * (geometry.rank - len(given))), geometry.rank)


def token(
    batch: int, heads: int, dim: int, kv_heads: int, value_dim: int, dtype: torch.dtype, return_lse: bool, masked: bool
) -> Token:
    lse = torch.promote_types(dtype, torch.float32).itemsize if return_lse else 0
    query, key_value = heads * dim, kv_heads * (dim + value_dim) + masked
    out = heads * (value_dim * dtype.itemsize + lse)
    return Token(batch * query * dtype.itemsize, batch * key_value * dtype.itemsize, batch * out)


def _received(geometry: Geometry, ranks: tuple[int, ...], token: Token, schemes: tuple[str, ...]) -> IntArray:
    """Bytes that each rank receives. Axes are exchanged one after the other, and the classes' outputs in reverse."""
    axes = [_counts(*each) for each in zip(geometry.axes, ranks, schemes, strict=True)]
    queries, keys = [own for own, *_ in axes], [own for own, *_ in axes]
    total = np.zeros(ranks, dtype=np.int64)
    for number, (_, computed, read, gathered, returned) in enumerate(axes):
        total += token.key_value * _outer(keys, number, gathered)
        keys[number] = read
        if schemes[number] == CLASSES:
            total += token.query * _outer(queries, number, gathered)
            queries[number] = computed
            total += token.out * _outer(queries, number, returned)
    return total


def _counts(axis: Axis, ranks: int, scheme: str) -> tuple[IntArray, ...]:
    """Per rank: positions owned, computed, read, received to read them, and received as outputs."""
    own = chunks(axis.size, ranks)
    if scheme == WHOLE:
        return (np.array([axis.size]),) * 3 + (np.zeros(1, dtype=np.int64),) * 2
    parts = shares(axis, ranks, scheme)
    computed, needed = [part.owned for part in parts], [part.needed for part in parts]
    lengths = [np.array([*map(len, positions)]) for positions in (own, computed, needed)]
    received = [_from_others(moved(*pair)) for pair in ((own, needed), (computed, own))]
    return *lengths, *received


def _from_others(counts: IntArray) -> IntArray:
    return counts.sum(0) - counts.diagonal()


def _outer(sizes: list[IntArray], axis: int, count: IntArray) -> IntArray:
    """Tokens of a move along one axis on every rank."""
    factors = [count if number == axis else size for number, size in enumerate(sizes)]
    return reduce(np.multiply, np.ix_(*factors))
