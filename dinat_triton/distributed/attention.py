"""Attention on the local part of a sharded map: fetch what windows need, attend on small maps, send outputs back.

Queries that see none but the rank's own keys are computed while the others' keys are on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from dinat_triton import functional
from dinat_triton.distributed.costs import cheapest, token
from dinat_triton.distributed.exchange import Route, depart, exchange, route
from dinat_triton.distributed.shares import CLASSES, HALO, Share, chunks, shares, split_share
from dinat_triton.geometry import BORDERS, Axis, Geometry, IntArray, geometry_of


@dataclass(frozen=True)
class Split:
    """One map axis over the ranks of a group, in their order, as DTensor does."""

    group: dist.ProcessGroup
    ranks: int
    rank: int


@dataclass(frozen=True, eq=False)
class Piece:
    """Some of a rank's queries along one axis, and the keys that they read.

    Attributes:
        share: The small axis on which they are computed.
        first: The first of them, among the rank's queries.
        slots: Tokens of the small axis whose keys are read.
        sources: Where these are among the keys that the rank has by then.
    """

    share: Share
    first: int
    slots: Tensor
    sources: Tensor

    @staticmethod
    def of(share: Share, queries: IntArray, keys: IntArray, device: torch.device) -> Piece:
        """The piece of a rank that has these queries and keys."""
        first = int(np.searchsorted(queries, share.owned[0])) if len(share.queries) else 0
        sources = np.searchsorted(keys, share.needed)[share.sources]
        return Piece(share, first, *(torch.as_tensor(places, device=device) for places in (share.slots, sources)))

    def queries_of(self, query: Tensor, dim: int) -> Tensor:
        """The queries, with zeros for tokens of the small axis whose outputs do not count."""
        counted = self.share.queries
        padding = [counted.start, self.share.axis.size - counted.stop]
        query = query.narrow(dim, self.first, len(counted))
        return torch.nn.functional.pad(query, [0, 0] * (query.ndim - 1 - dim) + padding) if any(padding) else query

    def keys_of(self, x: Tensor, dim: int) -> Tensor:
        """The keys at tokens of the small axis that some query sees, and zeros elsewhere."""
        if self.share.reads_all and x.shape[dim] == len(self.slots):
            return x
        shape = [*x.shape[:dim], self.share.axis.size, *x.shape[dim + 1 :]]
        return x.new_zeros(shape).index_copy(dim, self.slots, x.index_select(dim, self.sources))


@dataclass(frozen=True, eq=False)
class Part:
    """Moves and queries of this rank along one sharded axis.

    Attributes:
        dim: The axis, in tensors.
        group: The ranks that share it.
        scheme: "halo" or "classes".
        there: The move of keys to where they are read; of queries too with classes.
        back: The move of outputs to where they belong.
        whole: All queries of this rank.
        inner: Those that need none of the move, if they are worth being computed apart.
        ends: The others, before and after these.
    """

    dim: int
    group: dist.ProcessGroup
    scheme: str
    there: Route
    back: Route
    whole: Piece
    inner: Piece | None
    ends: tuple[Piece | None, ...]

    def depart(self, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Starts the move of query, key, value and mask; the function that it returns waits for the end."""
        moved = tensors if self.scheme == CLASSES else tensors[1:]
        arrive = depart(moved, self.dim, self.there, self.group)
        return lambda: [*tensors[: len(tensors) - len(moved)], *arrive()]


@torch.compiler.disable
def attend_shards(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shape: tuple[int, ...],
    window: Sequence[int],
    splits: tuple[Split | None, ...],
    rpb: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attends on the local parts of a map. Every rank that shares the map has to call it.

    Args:
        query: `[batch, *local map, heads, dim]`.
        key: As query; may have fewer heads.
        value: As key; may have another dim.
        shape: The whole map.
        window: Its windows, flat.
        splits: For each map axis how it is sharded, or None where every rank has all of it.
        rpb: Bias of the local heads.
        scale, dropout_p, return_lse, backend: As `na2d` has them.
        key_mask: `[batch, *local map]`.
    """
    tensors = [query, key, value]
    if key_mask is not None:  # as a key of one channel, so that it goes where the others go
        tensors.append(key_mask[..., None, None].to(key.dtype))
    parts = _parts(tensors, geometry_of(shape, tuple(window)), splits, return_lse)

    def compute(pieces: list[Piece]) -> list[Tensor]:
        own, small = tensors, list(window)
        for part, piece in zip(parts, pieces, strict=True):
            query, *read = own
            own = [piece.queries_of(query, part.dim), *(piece.keys_of(x, part.dim) for x in read)]
            # Only its dilation and its border can differ from those of the whole axis.
            small[2 * len(shape) + part.dim - 1] = piece.share.axis.dilation
            small[4 * len(shape) + part.dim - 1] = BORDERS.index(piece.share.axis.border)
        shown = own[3][..., 0, 0] != 0 if len(own) > 3 else None
        options = (rpb, scale, dropout_p, return_lse, backend, None, shown)
        outputs = [*functional.call_na(own[:3], small, *options)][: 1 + return_lse]
        for part, piece in zip(parts, pieces, strict=True):
            counted = piece.share.queries
            outputs = [x.narrow(part.dim, counted.start, len(counted)) for x in outputs]
        return outputs

    outputs: list[Tensor] | None = None
    for number in range(len(parts) + 1):
        arrive = parts[number].depart(tensors) if number < len(parts) else None
        outputs = _further(outputs, parts[:number], parts[number:], compute)
        if arrive is not None:
            tensors = arrive()
    assert outputs is not None
    for part in reversed(parts):
        if part.scheme == CLASSES:
            # Apart, because the log-sum-exp is wider than a narrow output.
            outputs = [exchange([x], part.dim, part.back, part.group)[0] for x in outputs]
    return outputs[0], outputs[1] if return_lse else None


def _further(
    outputs: list[Tensor] | None, arrived: list[Part], awaited: list[Part], compute: Callable[..., list[Tensor]]
) -> list[Tensor] | None:
    """Outputs of all queries that need none of the moves that are awaited; before the last arrival they were these."""
    inner = [part.inner for part in awaited]
    if None in inner:
        return None
    if not arrived:
        return compute(inner)
    whole, last = [part.whole for part in arrived[:-1]], arrived[-1]
    if outputs is None:
        return compute([*whole, last.whole, *inner])
    before, after = ([] if end is None else [compute([*whole, end, *inner])] for end in last.ends)
    return [torch.cat(pieces, last.dim) for pieces in zip(*before, outputs, *after, strict=True)]


def _parts(tensors: list[Tensor], geometry: Geometry, splits: tuple[Split | None, ...], return_lse: bool) -> list[Part]:
    query, key, value, *mask = tensors
    batch, heads, dim = max(len(query), 1), query.shape[-2], query.shape[-1]
    of_token = token(batch, heads, dim, key.shape[-2], value.shape[-1], query.dtype, return_lse, bool(mask))
    schemes = cheapest(geometry, tuple(split.ranks if split else 1 for split in splits), of_token).schemes
    parts = []
    for number, (axis, split, scheme) in enumerate(zip(geometry.axes, splits, schemes, strict=True)):
        if split is not None and split.ranks > 1:
            own = _pieces(axis, split.ranks, scheme, split.rank, query.device)
            parts.append(Part(1 + number, split.group, scheme, *own))
    return parts


@lru_cache(maxsize=512)
def _pieces(axis: Axis, ranks: int, scheme: str, rank: int, device: torch.device) -> tuple[Any, ...]:
    """Fields of a `Part`, wherever its axis is in a tensor."""
    all_shares, chunked = shares(axis, ranks, scheme), chunks(axis.size, ranks)
    there = route(chunked, [share.needed for share in all_shares], rank, device)
    back = route([share.owned for share in all_shares], chunked, rank, device)
    share, own = all_shares[rank], chunked[rank]
    whole = Piece.of(share, share.owned, share.needed, device)
    before, inner, after = (scheme == HALO and split_share(axis, own)) or (None,) * 3
    ends = tuple(end and Piece.of(end, own, share.needed, device) for end in (before, after))
    return there, back, whole, inner and Piece.of(inner, own, own, device), ends
