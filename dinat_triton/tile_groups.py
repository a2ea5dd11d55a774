"""A plan as `tiled` takes it: groups of tiles, and where their tokens lie in the tensors of a call.

Index tensors are made from bases and offsets when a group is taken. On small maps making them would cost about as much
as using them, so there they are kept: at most about a megabyte for each of a few dozen cuts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from dinat_triton import bias
from dinat_triton.device_tiles import DeviceTiles, vectors_of
from dinat_triton.geometry import Geometry
from dinat_triton.plan import Plan, TileClass

# Scores held at once: a few megabytes, so that a group's products and softmax stay in cache.
SCORES_AT_ONCE = 1 << 20
# Tokens of all batch items, and pairs of all tile classes, of a cut that keeps its index tensors.
KEPT_TOKENS, KEPT_PAIRS = 1 << 12, 1 << 16


@dataclass(frozen=True, eq=False)
class TiledClass(DeviceTiles):
    """A tile class with its bias indices, and where its tokens lie in packed tensors."""

    packed: tuple[Tensor, Tensor, Tensor]  # offsets of queries [R], keys [S] and values [S] in a tensor that packs them
    axis_indices: list[Tensor]  # what each axis adds to the bias index of a pair
    num_offsets: int
    is_whole: bool  # one tile holds all tokens in their order: nothing to gather


@lru_cache(maxsize=128)
def classes_of(geometry: Geometry, tile: tuple[int, ...], device: torch.device) -> list[TiledClass]:
    """The tile classes of a plan on a device."""
    return [_tiled_class(c, device) for c in Plan(geometry, tile).classes]


def _tiled_class(c: TileClass, device: torch.device) -> TiledClass:
    rows, columns, row_base, col_base = vectors_of(c, device)
    is_whole = all(len(x) == c.geometry.num_tokens and bool((np.diff(x) == 1).all()) for x in (c.rows, c.columns))
    packed = (3 * rows, 3 * columns + 1, 3 * columns + 2)
    indices = bias.axis_indices(c, device)
    return TiledClass(rows, columns, row_base, col_base, packed, indices, c.geometry.num_offsets, is_whole)


@dataclass(eq=False)
class Group:
    """Some tiles of one class, in every batch item. Slots are `[batch * tiles * cells]`, item after item."""

    tiles: TiledClass
    row_base: Tensor
    col_base: Tensor
    first_tokens: Tensor  # [batch]: of each item, among those of all

    @cached_property
    def rows(self) -> Tensor:
        """Slots of the rows among the tokens of all batch items."""
        return self._slots(self.row_base, self.tiles.rows)

    @cached_property
    def columns(self) -> Tensor:
        """Slots of the columns among the tokens of all batch items."""
        return self._slots(self.col_base, self.tiles.columns)

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Slots of queries, keys and values in a tensor that packs them."""
        q, k, v = self.tiles.packed
        return self._slots(self.row_base, q, 3), self._slots(self.col_base, k, 3), self._slots(self.col_base, v, 3)

    def _slots(self, base: Tensor, offsets: Tensor, packed: int = 1) -> Tensor:
        base = (self.first_tokens[:, None] + base).view(-1) if len(self.first_tokens) > 1 else base
        return ((base if packed == 1 else packed * base)[:, None] + offsets).view(-1)


class Cut:
    """A plan for so many maps."""

    def __init__(self, geometry: Geometry, tile: tuple[int, ...], device: torch.device, batch: int, heads: int):
        self.classes = classes_of(geometry, tile, device)
        self.maps, tokens = batch * heads, geometry.num_tokens
        self.first_tokens = torch.arange(0, batch * tokens, tokens, device=device)
        pairs = sum(len(tiles.rows) * len(tiles.columns) for tiles in self.classes)
        self.is_small = batch * tokens <= KEPT_TOKENS and pairs <= KEPT_PAIRS
        self._parts = [CutClass(self, tiles) for tiles in self.classes] if self.is_small else None
        self._order: Tensor | None = None

    def parts(self) -> Iterator[CutClass]:
        """Yields the classes."""
        yield from (CutClass(self, tiles) for tiles in self.classes) if self._parts is None else self._parts

    def order(self, slots: list[Tensor]) -> Tensor:
        """The place of each token among the rows of all groups, whose slots these are."""
        if self._order is not None:
            return self._order
        together = torch.cat(slots)
        order = torch.empty_like(together)
        order.scatter_(0, together, torch.arange(len(together), device=order.device))
        self._order = order if self.is_small else None
        return order


class CutClass:
    """A tile class of a cut."""

    def __init__(self, cut: Cut, tiles: TiledClass):
        self.cut, self.tiles = cut, tiles
        self._groups = list(self._cut_groups()) if cut.is_small else None

    @cached_property
    def pair_index(self) -> Tensor:
        """Bias index of every pair, `[R * S]`."""
        return bias.pair_index(self.tiles.axis_indices, self.tiles.num_offsets)

    def groups(self) -> Iterator[Group]:
        """Yields groups whose scores stay within SCORES_AT_ONCE."""
        yield from self._cut_groups() if self._groups is None else self._groups

    def _cut_groups(self) -> Iterator[Group]:
        for bases in self.tiles.split(self.cut.maps, SCORES_AT_ONCE):
            yield Group(self.tiles, *bases, self.cut.first_tokens)


@lru_cache(maxsize=32)
def cut_of(geometry: Geometry, tile: tuple[int, ...], device: torch.device, batch: int, heads: int) -> Cut:
    """Each cut once."""
    return Cut(geometry, tile, device, batch, heads)
