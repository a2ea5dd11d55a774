"""Sums over the pairs of a query `i` and the key `n(i, w)` in slot `w` of its window, as an op of torch.

    dot(x, y)[i, w] = x[i] . y[n(i, w)] + the pair's bias     scores
    pull(p, y)[i]   = sum of p[i, w] y[n(i, w)] over w        what a query gets
    push(p, x)[j]   = sum of p[i, w] x[i] over n(i, w) = j    what a key gets
    fold(p, rpb)    = sum of p over the pairs of each bias
    spread(rpb, p)  = the bias of each pair

Each is linear in each of its tensors, and its derivatives are among the others: so all can be differentiated any number
of times, and forwards. A tile's pairs are worked out as one dense matrix, whose slots are picked; nothing larger than a
few megabytes is held but the tensors that come and go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from dinat_triton.device_tiles import DeviceTiles, vectors_of
from dinat_triton.fused import LIBRARY
from dinat_triton.geometry import Geometry, IntArray, geometry_of, outer_index, rank_of
from dinat_triton.plan import AxisTiles, Plan, TileClass
from dinat_triton.reference import accumulator
from dinat_triton.tiled import choose_tile

# Scores of whole tiles held at once: a megabyte, beside the slots that are picked from them.
SCORES_AT_ONCE = 1 << 18

LIBRARY.define("pairs(str name, Tensor first, Tensor second, int[] window, Tensor? rpb, float outside) -> Tensor")
PAIRS = torch.ops.dinat_triton.pairs.default


def pairs(
    name: str, first: Tensor, second: Tensor, window: list[int], rpb: Tensor | None = None, outside: float = 0.0
) -> Tensor:
    """One of the sums. `dot` adds `rpb`, if there is one, and gives slots without a key the value `outside`.

    Heads come first: `[batch, heads, *shape, dim]`, and p `[batch, heads, *shape, window]`.
    """
    call = PAIRS if torch.compiler.is_compiling() else Pairs.apply
    return call(name, first, second, window, rpb, outside)


class Pairs(torch.autograd.Function):
    """The op with its derivatives."""

    @staticmethod
    def forward(ctx, name, first, second, window, rpb, outside):
        ctx.save_for_backward(first, second, rpb)
        ctx.save_for_forward(first, second, rpb)
        ctx.name, ctx.window = name, window
        with torch._C._AutoDispatchBelowAutograd():
            return PAIRS(name, first, second, window, rpb, outside)

    @staticmethod
    def backward(ctx, grad):
        first, second, rpb = ctx.saved_tensors
        of_first, of_second = {
            "dot": (("pull", grad, second), ("push", grad, first)),
            "pull": (("dot", grad, second), ("push", first, grad)),
            "push": (("dot", second, grad), ("pull", first, grad)),
            "fold": (("spread", grad, first), None),
            "spread": (("fold", grad, first), None),
        }[ctx.name]
        of_rpb = ("fold", grad, rpb)
        _, *needed = ctx.needs_input_grad
        grad_first, grad_second, grad_rpb = (
            pairs(*arguments, ctx.window) if needs and arguments is not None else None
            for arguments, needs in zip((of_first, of_second, of_rpb), (needed[0], needed[1], needed[3]), strict=True)
        )
        return None, grad_first, grad_second, None, grad_rpb, None

    @staticmethod
    def jvp(ctx, _name, first_t, second_t, _window, rpb_t, _outside):
        first, second, _ = ctx.saved_tensors
        parts = []
        if first_t is not None:
            parts.append(pairs(ctx.name, first_t, second, ctx.window))
        if second_t is not None and ctx.name not in ("fold", "spread"):  # there it lends its shape and dtype only
            parts.append(pairs(ctx.name, first, second_t, ctx.window))
        if rpb_t is not None:
            parts.append(pairs("spread", rpb_t, pairs("dot", first, second, ctx.window), ctx.window))
        return sum(parts)


def _autograd(*arguments):
    return Pairs.apply(*arguments)


def _fake(name, first, second, window, rpb, outside):
    if name == "dot":
        return first.new_empty(*first.shape[:-1], prod(window[: rank_of(window)]))
    return torch.empty_like(second, memory_format=torch.contiguous_format)  # in every other sum these are alike


def _below_autograd(name, first, second, window, rpb, outside):
    if torch.is_autocast_enabled(first.device.type):  # it must not round what is computed here
        with torch.autocast(first.device.type, enabled=False):
            return _below_autograd(name, first, second, window, rpb, outside)
    out = _fake(name, first, second, window, rpb, outside)
    if first.numel() == 0 or second.numel() == 0:
        return out.zero_()
    rank = rank_of(window)
    batch, heads, *shape = (second if name == "spread" else first).shape[: 2 + rank]
    call = Sums(geometry_of(tuple(map(int, shape)), tuple(window)), batch, heads, first.device)
    if name == "dot":
        call.dot(call.tokens(first), call.tokens(second), rpb, outside, call.tokens(out))
    elif name == "pull":
        call.pull(call.tokens(first), call.tokens(second), call.tokens(out))
    elif name == "push":
        out.copy_(call.push(call.tokens(first), call.tokens(second)).view(out.shape))
    elif name == "fold":
        out.copy_(call.fold(call.tokens(first)).view(out.shape))
    else:
        call.spread(first, call.tokens(out))
    return out


class Sums:
    """The sums of one call, tile by tile. Its tensors are `[batch * heads, tokens, dim or window]`."""

    def __init__(self, geometry: Geometry, batch: int, heads: int, device: torch.device):
        self.geometry, self.batch, self.heads, self.device = geometry, batch, heads, device
        self.maps = batch * heads

    def tokens(self, x: Tensor) -> Tensor:
        """A tensor with heads first in the form of this class."""
        return x.reshape(self.maps, self.geometry.num_tokens, x.shape[-1])

    def groups(self) -> Iterator[tuple[Slots, Tensor, Tensor]]:
        """Yields a few tiles of one class at a time, with the tokens of their rows and of their columns."""
        tile = choose_tile(self.geometry, self.batch, self.heads)
        for slots in slots_of(self.geometry, tile, self.device):
            for row_base, col_base in slots.split(self.maps, SCORES_AT_ONCE):
                yield slots, row_base[:, None] + slots.rows, col_base[:, None] + slots.columns

    def dot(self, x: Tensor, y: Tensor, rpb: Tensor | None, outside: float, out: Tensor) -> None:
        for slots, rows, columns in self.groups():
            tile = take(x, rows) @ take(y, columns).mT
            tile = tile.gather(-1, slots.column.expand(*tile.shape[:2], -1, -1))
            if rpb is not None:
                tile.unflatten(0, (self.batch, self.heads)).add_(rpb.flatten(1)[:, None, slots.offset])
            put(out, rows, tile.masked_fill_(slots.empty, outside))

    def pull(self, p: Tensor, y: Tensor, out: Tensor) -> None:
        for slots, rows, columns in self.groups():
            put(out, rows, self.dense(p, slots, rows) @ take(y, columns))

    def push(self, p: Tensor, x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape, dtype=accumulator(x.dtype))
        for slots, rows, columns in self.groups():
            out.index_add_(1, columns.flatten(), (self.dense(p, slots, rows).mT @ take(x, rows)).flatten(1, 2))
        return out

    def fold(self, p: Tensor) -> Tensor:
        out = p.new_zeros(self.heads, self.geometry.num_offsets, dtype=accumulator(p.dtype))
        for slots, rows, _ in self.groups():
            tile = take(p, rows).masked_fill_(slots.empty, 0).unflatten(0, (self.batch, self.heads)).sum((0, 2))
            out.index_add_(1, slots.offset.flatten(), tile.flatten(1))
        return out

    def spread(self, rpb: Tensor, out: Tensor) -> None:
        for slots, rows, _ in self.groups():
            tile = rpb.flatten(1)[:, None, slots.offset].masked_fill(slots.empty, 0)
            put(out, rows, tile.expand(self.batch, -1, len(rows), -1, -1).flatten(0, 1))

    def dense(self, p: Tensor, slots: Slots, rows: Tensor) -> Tensor:
        """Spreads p over matrices of all rows and columns of tiles, `[maps, tiles, R, S]`."""
        tile = take(p, rows).masked_fill_(slots.empty, 0)
        matrix = tile.new_zeros(*tile.shape[:-1], len(slots.columns))
        return matrix.scatter_add_(-1, slots.column.expand(tile.shape), tile)


def take(x: Tensor, tokens: Tensor) -> Tensor:
    """Tokens of tiles, `[maps, tiles, cells, dim]`, in the dtype to compute in."""
    return x.index_select(1, tokens.flatten()).unflatten(1, tokens.shape).to(accumulator(x.dtype))


def put(out: Tensor, tokens: Tensor, tile: Tensor) -> None:
    """The inverse of `take`."""
    out.index_copy_(1, tokens.flatten(), tile.flatten(1, 2).to(out.dtype))


@dataclass(frozen=True, eq=False)
class Slots(DeviceTiles):
    """A tile class, and which of its columns are in the windows of its rows."""

    column: Tensor  # [R, window] the column in each slot
    offset: Tensor  # [R, window] the bias index of the pair
    empty: Tensor  # [R, window] whether the window is shorter; column and offset are 0 there


@lru_cache(maxsize=128)
def slots_of(geometry: Geometry, tile: tuple[int, ...], device: torch.device) -> list[Slots]:
    """The tile classes of a plan on a device."""
    return [_slots(c, device) for c in Plan(geometry, tile).classes]


def _slots(c: TileClass, device: torch.device) -> Slots:
    columns, offsets = zip(*map(_axis_slots, c.axes, c.geometry.kernel_size), strict=True)
    column = outer_index(columns, [axis.columns for axis in c.axes])
    offset = outer_index(offsets, c.geometry.bias_shape)
    arrays = (column.clip(0), offset.clip(0), column < 0)
    return Slots(*vectors_of(c, device), *(torch.as_tensor(x, device=device) for x in arrays))


def _axis_slots(axis: AxisTiles, kernel: int) -> tuple[IntArray, IntArray]:
    """Column and bias index of the slots of each row on one axis, `[rows, kernel]`, -1 where the window is shorter."""
    column = axis.first[:, None] + np.arange(kernel)
    seen = column <= axis.last[:, None]
    offset = axis.row_code[:, None] + axis.col_code[np.where(seen, column, 0)]
    return np.where(seen, column, -1), np.where(seen, offset, -1)


LIBRARY.impl("pairs", _below_autograd, "CompositeExplicitAutograd")
LIBRARY.impl("pairs", _autograd, "Autograd")
torch.library.register_fake("dinat_triton::pairs", _fake, lib=LIBRARY)
