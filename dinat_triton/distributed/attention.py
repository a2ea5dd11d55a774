"""Attention on the local part of a sharded map: fetch what windows need, attend on a small map, send outputs back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch import distributed as dist

from dinat_triton import functional
from dinat_triton.distributed.costs import cheapest, token
from dinat_triton.distributed.exchange import Route, exchange, route
from dinat_triton.distributed.shares import CLASSES, Share, chunks, shares
from dinat_triton.geometry import BORDERS, Axis, Geometry, geometry_of


@dataclass(frozen=True)
class Cut:
    """How one map axis is sharded: over the ranks of a group, in their order, as DTensor does."""

    group: dist.ProcessGroup
    ranks: int
    rank: int


@dataclass(frozen=True)
class Part:
    """What this rank does about one sharded axis: its share, and the moves to it and back."""

    dim: int
    scheme: str
    share: Share
    there: Route
    back: Route
    group: dist.ProcessGroup


@torch.compiler.disable
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shape: tuple[int, ...],
    window: Sequence[int],
    cuts: tuple[Cut | None, ...],
    rpb: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attends on the local parts of a map. Every rank that shares the map has to call it.

    Args:
        query: `[batch, *local map, heads, dim]`.
        key: As query; may have fewer heads.
        value: As key; may have another dim.
        shape: The whole map.
        window: Its windows, flat.
        cuts: For each map axis how it is sharded, or None where every rank has all of it.
        rpb: Bias of the local heads.
        scale, dropout_p, return_lse, backend: As `na2d` has them.
    """
    parts = _parts(query, key, value, geometry_of(shape, tuple(window)), cuts, return_lse)
    for part in parts:
        if part.scheme == CLASSES:
            query, key, value = exchange([query, key, value], part.dim, part.there, part.group)
        else:
            key, value = exchange([key, value], part.dim, part.there, part.group)
    for part in parts:
        query = _padded(query, part)
        key, value = _spread(key, part), _spread(value, part)
    small = _small(window, parts, len(shape))
    out, lse = functional.attend([query, key, value], small, rpb, scale, dropout_p, return_lse, backend)
    outputs = [out, lse] if return_lse else [out]
    for part in parts:
        outputs = [x.narrow(part.dim, part.share.queries.start, len(part.share.queries)) for x in outputs]
    for part in reversed(parts):
        if part.scheme == CLASSES:
            # Apart, because the log-sum-exp is wider than a narrow output.
            outputs = [exchange([x], part.dim, part.back, part.group)[0] for x in outputs]
    return outputs[0], outputs[1] if return_lse else lse


def _parts(
    query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, cuts: tuple[Cut | None, ...], return_lse: bool
) -> list[Part]:
    batch, heads, dim = max(len(query), 1), query.shape[-2], query.shape[-1]
    of_token = token(batch, heads, dim, key.shape[-2], value.shape[-1], query.dtype, return_lse)
    schemes = cheapest(geometry, tuple(cut.ranks if cut else 1 for cut in cuts), of_token).schemes
    parts = []
    for number, (axis, cut, scheme) in enumerate(zip(geometry.axes, cuts, schemes, strict=True)):
        if cut is not None and cut.ranks > 1:
            share, there, back = _moves(axis, cut.ranks, scheme, cut.rank, query.device)
            parts.append(Part(1 + number, scheme, share, there, back, cut.group))
    return parts


@lru_cache(maxsize=512)
def _moves(axis: Axis, ranks: int, scheme: str, rank: int, device: torch.device) -> tuple[Share, Route, Route]:
    """A rank's share of an axis, the move of what it reads, and the move of what it computes to where that belongs."""
    all_shares, own = shares(axis, ranks, scheme), chunks(axis.size, ranks)
    there = route(own, [share.needed for share in all_shares], rank, device)
    back = route([share.owned for share in all_shares], own, rank, device)
    return all_shares[rank], there, back


def _padded(query: Tensor, part: Part) -> Tensor:
    """Queries with zeros for those tokens of the share whose outputs do not count."""
    before, after = part.share.queries.start, part.share.axis.size - part.share.queries.stop
    if before == after == 0:
        return query
    behind = query.ndim - 1 - part.dim
    return torch.nn.functional.pad(query, [0, 0] * behind + [before, after])


def _spread(x: Tensor, part: Part) -> Tensor:
    """Keys at those tokens of the share that some query sees, and zeros elsewhere."""
    share = part.share
    if share.reads_all:
        return x
    slots, sources = (torch.as_tensor(places, device=x.device) for places in (share.slots, share.sources))
    shape = [*x.shape[: part.dim], share.axis.size, *x.shape[part.dim + 1 :]]
    return x.new_zeros(shape).index_copy(part.dim, slots, x.index_select(part.dim, sources))


def _small(window: Sequence[int], parts: list[Part], rank: int) -> list[int]:
    """The window on the small map; only its dilation and its border can differ."""
    small = list(window)
    for part in parts:
        small[2 * rank + part.dim - 1] = part.share.axis.dilation
        small[4 * rank + part.dim - 1] = BORDERS.index(part.share.axis.border)
    return small
