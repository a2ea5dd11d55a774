"""The one way in which tensors move between ranks: positions of an axis, from those that own to those that want them.

Halos, whole residue classes, the rows that a convolution reads and the way back of all of these are such moves. The
gradient is the transposed move; what comes from several ranks is added in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from dinat_triton.geometry import IntArray


@dataclass(frozen=True, eq=False)
class Route:
    """A rank's part of a move along an axis, for each other rank.

    Attributes:
        sends: Which of its own tokens go to each rank.
        receives: Where the tokens of each rank come to lie.
        owned: Tokens before the move.
        wanted: Tokens after it.
        is_idle: Whether no rank sends anything to another.
    """

    sends: tuple[Tensor, ...]
    receives: tuple[Tensor, ...]
    owned: int
    wanted: int
    is_idle: bool

    def transposed(self) -> Route:
        return Route(self.receives, self.sends, self.wanted, self.owned, self.is_idle)


def moved(owned: Sequence[IntArray], wanted: Sequence[IntArray]) -> IntArray:
    """`[from, to]`: positions that go from each rank to each, or stay there. Every position has one owner."""
    owner = np.empty(sum(map(len, owned)), dtype=np.int64)
    owner[np.concatenate(owned)] = np.repeat(np.arange(len(owned)), [*map(len, owned)])
    return np.stack([np.bincount(owner[want], minlength=len(owned)) for want in wanted], axis=1)


def route(owned: Sequence[IntArray], wanted: Sequence[IntArray], rank: int, device: torch.device) -> Route:
    """The move after which each rank has what it wants, as one of them sees it. Positions ascend on every rank."""

    def places(own: IntArray, want: IntArray, side: int) -> Tensor:
        both = np.intersect1d(own, want, assume_unique=True, return_indices=True)
        return torch.as_tensor(both[1 + side], device=device)

    sends = tuple(places(owned[rank], want, 0) for want in wanted)
    receives = tuple(places(own, wanted[rank], 1) for own in owned)
    counts = moved(owned, wanted)
    return Route(sends, receives, len(owned[rank]), len(wanted[rank]), int(counts.sum() - counts.trace()) == 0)


@torch.compiler.disable
def exchange(tensors: Sequence[Tensor], dim: int, route: Route, group: dist.ProcessGroup) -> list[Tensor]:
    """Moves tensors of one dtype along their axis `dim` in one collective. Every rank of the group has to call it."""
    return list(_Exchange.apply(dim, route, group, *tensors))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dim, route, group, *tensors):
        ctx.dim, ctx.route, ctx.group = dim, route, group
        return tuple(_move(tensors, dim, route, group))

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *_move(grads, ctx.dim, ctx.route.transposed(), ctx.group)


def _move(tensors: Sequence[Tensor], dim: int, route: Route, group: dist.ProcessGroup) -> list[Tensor]:
    rank = dist.get_rank(group)
    received = _swap(tensors, dim, route, rank, group)
    received[rank] = [x.index_select(dim, route.sends[rank]) for x in tensors]
    moved = [x.new_zeros(_resized(x, dim, route.wanted)) for x in tensors]
    for parts, places in zip(received, route.receives, strict=True):
        for whole, part in zip(moved, parts, strict=True):
            whole.index_add_(dim, places, part)
    return moved


def _swap(tensors: Sequence[Tensor], dim: int, route: Route, rank: int, group: dist.ProcessGroup) -> list[list[Tensor]]:
    """What each other rank sends to this one."""
    others = [places if i != rank else places[:0] for i, places in enumerate(route.sends)]
    shapes = [
        [_resized(x, dim, len(places) if i != rank else 0) for x in tensors] for i, places in enumerate(route.receives)
    ]
    counts = [sum(map(prod, parts)) for parts in shapes]
    if route.is_idle:
        received = tensors[0].new_empty(0)
    else:
        per_token = sum(prod(_resized(x, dim, 1)) for x in tensors)
        packed = torch.cat([x.index_select(dim, places).reshape(-1) for places in others for x in tensors])
        received = packed.new_empty(sum(counts))
        dist.all_to_all_single(received, packed, counts, [per_token * len(places) for places in others], group=group)
    return [_unpack(chunk, parts) for chunk, parts in zip(received.split(counts), shapes, strict=True)]


def _unpack(chunk: Tensor, shapes: list[list[int]]) -> list[Tensor]:
    return [part.view(shape) for part, shape in zip(chunk.split([*map(prod, shapes)]), shapes, strict=True)]


def _resized(x: Tensor, dim: int, size: int) -> list[int]:
    return [*x.shape[:dim], size, *x.shape[dim + 1 :]]
