"""A plan as `tiled` takes it: groups of tiles, and where their tokens lie in the tensors of a call.

Index tensors are made from bases and offsets when a class or a group is taken. On small maps making them would cost
about as much as using them, so there they are kept: at most about a megabyte for each of a few dozen cuts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


class Cut:
    """A plan for so many maps."""

    def __init__(self, geometry: Geometry, tile: tuple[int, ...], device: torch.device, batch: int, heads: int):
        tokens = geometry.num_tokens
        self.plan, self.device, self.maps = Plan(geometry, tile), device, batch * heads
        self.first_tokens = torch.arange(0, batch * tokens, tokens, device=device)
        # One tile holds all tokens in their order: nothing to gather.
        first = next(self.plan.each_class())
        in_order = all(np.array_equal(x, np.arange(tokens)) for x in (first.rows, first.columns))
        self.is_whole = in_order and self.plan.num_tiles == 1
        self.is_small = batch * tokens <= KEPT_TOKENS and self.plan.cost().table_entries <= KEPT_PAIRS
        self._classes = list(self._each_class()) if self.is_small else None
        self.order: Tensor | None = None  # kept from `find_order`

    def classes(self) -> Iterable[CutClass]:
        """The tile classes, one after the other."""
        return self._each_class() if self._classes is None else self._classes

    def _each_class(self) -> Iterator[CutClass]:
        for tiles in self.plan.each_class():
            yield CutClass(*vectors_of(tiles, self.device), tiles, self)

    def find_order(self, slots: Tensor) -> Tensor:
        """The place of each token among the rows of all groups, whose slots these are."""
        order = torch.empty_like(slots)
        order.scatter_(0, slots, torch.arange(len(slots), device=order.device))
        self.order = order if self.is_small else None
        return order


@dataclass(frozen=True, eq=False)
class CutClass(DeviceTiles):
    """A tile class of a cut."""

    tiles: TileClass
    cut: Cut

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets of queries `[R]`, keys `[S]` and values `[S]` in a tensor that packs them."""
        return 3 * self.rows, 3 * self.columns + 1, 3 * self.columns + 2

    def pair_indices(self) -> Iterable[Tensor]:
        """Bias indices of all pairs, some rows at a time."""
        return self._kept_indices if self.cut.is_small else bias.pair_indices(self.tiles, self.cut.device)

    @cached_property
    def _kept_indices(self) -> list[Tensor]:
        return list(bias.pair_indices(self.tiles, self.cut.device))

    def groups(self) -> Iterable[Group]:
        """Groups whose scores stay within SCORES_AT_ONCE."""
        return self._kept_groups if self.cut.is_small else self._each_group()

    @cached_property
    def _kept_groups(self) -> list[Group]:
        return list(self._each_group())

    def _each_group(self) -> Iterator[Group]:
        for row_base, col_base in self.split(self.cut.maps, SCORES_AT_ONCE):
            yield Group(self, row_base, col_base, self.cut.first_tokens)


@dataclass(eq=False)
class Group:
    """Some tiles of one class, in every batch item. Slots are `[batch * tiles * cells]`, item after item."""

    tiles: CutClass
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


@lru_cache(maxsize=32)
def cut_of(geometry: Geometry, tile: tuple[int, ...], device: torch.device, batch: int, heads: int) -> Cut:
    """Each cut once."""
    return Cut(geometry, tile, device, batch, heads)
