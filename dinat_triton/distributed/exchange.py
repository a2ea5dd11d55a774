"""The one way in which tensors move between ranks: positions of an axis, from those that own to those that want them.

Halos, whole residue classes, the rows that a convolution reads and the way back of all of these are such moves. The
gradient is the transposed move; what comes from several ranks is added in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    return depart(tensors, dim, route, group)()


def depart(tensors: Sequence[Tensor], dim: int, route: Route, group: dist.ProcessGroup) -> Callable[[], list[Tensor]]:
    """Begins the same move; the function that it returns waits for the end.

    What is computed in between overlaps with the move. Its gradients overlap with the move of the others, as autograd
    takes first what came last.
    """
    transit = _Transit(dim, group)
    ticket = _Depart.apply(transit, route, *tensors)
    return lambda: list(_Arrive.apply(transit, route, ticket))


class _Depart(torch.autograd.Function):
    """Sends tensors; its backward receives their gradients. An empty ticket ties it to what arrives."""

    @staticmethod
    def forward(ctx, transit, route, *tensors):
        ctx.transit = transit
        transit.send(tensors, route)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx, _ticket):
        return None, None, *ctx.transit.receive()


class _Arrive(torch.autograd.Function):
    """Receives tensors; its backward sends their gradients."""

    @staticmethod
    def forward(ctx, transit, route, ticket):
        ctx.transit, ctx.route = transit, route
        return tuple(transit.receive())

    @staticmethod
    def backward(ctx, *grads):
        ctx.transit.send(grads, ctx.route.transposed())
        return None, None, grads[0].new_empty(0)


class _Transit:
    """Tensors between `send` and `receive`; gradients go the same way back."""

    def __init__(self, dim: int, group: dist.ProcessGroup):
        self.dim, self.group, self.rank = dim, group, dist.get_rank(group)

    def send(self, tensors: Sequence[Tensor], route: Route) -> None:
        dim, rank = self.dim, self.rank
        per_token = sum(prod(_resized(x, dim, 1)) for x in tensors)
        sends, receives = (
            [len(places) * per_token if i != rank else 0 for i, places in enumerate(side)]
            for side in (route.sends, route.receives)
        )
        others = [places for i, places in enumerate(route.sends) if i != rank]
        self.route, self.counts = route, receives
        self.kept = [x.index_select(dim, route.sends[rank]) for x in tensors]
        self.sent = torch.cat([x.index_select(dim, places).reshape(-1) for places in others for x in tensors])
        self.received, self.work = self.sent.new_empty(sum(receives)), None
        if not route.is_idle:
            buffers = self.received, self.sent, receives, sends
            self.work = dist.all_to_all_single(*buffers, group=self.group, async_op=True)

    def receive(self) -> list[Tensor]:
        if self.work is not None:
            self.work.wait()
        moved = [x.new_zeros(_resized(x, self.dim, self.route.wanted)) for x in self.kept]
        for i, (load, places) in enumerate(zip(self.received.split(self.counts), self.route.receives, strict=True)):
            shapes = [_resized(x, self.dim, len(places)) for x in self.kept]
            for whole, part in zip(moved, self.kept if i == self.rank else _unpack(load, shapes), strict=True):
                whole.index_add_(self.dim, places, part)
        del self.kept, self.sent, self.received, self.work
        return moved


def _unpack(chunk: Tensor, shapes: list[list[int]]) -> list[Tensor]:
    return [part.view(shape) for part, shape in zip(chunk.split([*map(prod, shapes)]), shapes, strict=True)]


def _resized(x: Tensor, dim: int, size: int) -> list[int]:
    return [*x.shape[:dim], size, *x.shape[dim + 1 :]]
