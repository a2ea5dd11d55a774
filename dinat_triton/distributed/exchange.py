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
    sent = [[x.index_select(dim, places) for x in tensors] for places in route.sends]
    shapes = [[_resized(x, dim, len(places)) for x in tensors] for places in route.receives]
    moved = [x.new_zeros(_resized(x, dim, route.wanted)) for x in tensors]
    for parts, places in zip(_swap(sent, shapes, route.is_idle, group), route.receives, strict=True):
        for whole, part in zip(moved, parts, strict=True):
            whole.index_add_(dim, places, part)
    return moved


def _swap(
    sent: list[list[Tensor]], shapes: list[list[list[int]]], is_idle: bool, group: dist.ProcessGroup
) -> list[list[Tensor]]:
    """What every rank sends to this one, of given shapes. What it sends to itself stays where it is."""
    rank = dist.get_rank(group)
    own = sent[rank]
    to = [0 if i == rank else sum(x.numel() for x in parts) for i, parts in enumerate(sent)]
    at = [0 if i == rank else sum(map(prod, parts)) for i, parts in enumerate(shapes)]
    packed = torch.cat([x.reshape(-1) for i, parts in enumerate(sent) if i != rank for x in parts])
    received = packed.new_empty(sum(at))
    if not is_idle:
        dist.all_to_all_single(received, packed, at, to, group=group)
    parts = zip(received.split(at), shapes, strict=True)
    return [own if i == rank else _unpack(chunk, form) for i, (chunk, form) in enumerate(parts)]


def _unpack(chunk: Tensor, shapes: list[list[int]]) -> list[Tensor]:
    return [part.view(shape) for part, shape in zip(chunk.split([*map(prod, shapes)]), shapes, strict=True)]


def _resized(x: Tensor, dim: int, size: int) -> list[int]:
    return [*x.shape[:dim], size, *x.shape[dim + 1 :]]
