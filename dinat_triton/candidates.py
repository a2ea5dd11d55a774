"""Tiles worth trying for a geometry, and what each would cost: arithmetic on counts per axis, with no plan built.

A plan is a product over axes, and so are its counts. Each axis is cut into tiles of every length worth trying at once;
what that gives is shared by all geometries, passes and maps that have such an axis.
"""

from __future__ import annotations

from functools import cached_property, lru_cache, reduce
from math import prod

import numpy as np

from dinat_triton.axis_cuts import AxisCuts, cut_axis
from dinat_triton.geometry import Axis, Geometry, IntArray, counted

# Axes are cut for tiles of so many rows at least, so that passes with smaller tiles share what was counted.
SHARED_ROWS = 64


class AxisCounts:
    """Counts of an axis that is cut into tiles of each length worth trying, `[lengths]` each."""

    def __init__(self, cuts: AxisCuts):
        self._cuts, self.lengths = cuts, cuts.lengths

    @cached_property
    def num_tiles(self) -> IntArray:
        """Tiles."""
        return self._sum(self._cuts.tiles)

    @cached_property
    def col_loads(self) -> IntArray:
        """Columns of all tiles."""
        return self._sum(self._cuts.tiles * self._cuts.columns)

    @cached_property
    def scores(self) -> IntArray:
        """Pairs of all tiles."""
        return self._sum(self._cuts.tiles * self._cuts.rows * self._cuts.columns)

    @cached_property
    def most_columns(self) -> IntArray:
        """Columns of the widest tile."""
        return np.maximum.reduceat(self._cuts.columns, np.searchsorted(self._cuts.cut, np.arange(len(self.lengths))))

    @cached_property
    def pictures(self) -> tuple[IntArray, IntArray]:
        """Different tiles, and their pairs."""
        marks = np.array((*self._cuts.pictures, self._cuts.cut))
        order = np.lexsort(marks)
        different = order[np.append(True, (np.diff(marks[:, order]) != 0).any(0))]
        cut, pairs = self._cuts.cut[different], (self._cuts.rows * self._cuts.columns)[different]
        return np.bincount(cut), np.bincount(cut, pairs).astype(np.int64)

    @cached_property
    def widths(self) -> tuple[IntArray, IntArray]:
        """`[lengths, widths]`: the numbers of columns that tiles have, and how many have each; padded with 0."""
        spread = int(self._cuts.columns.max()) + 1
        found, kind = np.unique(self._cuts.cut * spread + self._cuts.columns, return_inverse=True)
        cut, column = np.divmod(found, spread)
        _, place = counted(np.bincount(cut))
        columns, tiles = np.zeros((2, len(self.lengths), int(place.max()) + 1), dtype=np.int64)
        columns[cut, place], tiles[cut, place] = column, np.bincount(kind, self._cuts.tiles)
        return columns, tiles

    def _sum(self, counts: IntArray) -> IntArray:
        return np.bincount(self._cuts.cut, counts).astype(np.int64)


@lru_cache(maxsize=256)
def count_axis(axis: Axis, most_rows: int, transposed: bool = False, parts: bool = False) -> AxisCounts:
    """Counts of an axis in tiles of each length worth trying, of at most so many rows."""
    return AxisCounts(cut_axis(axis, tile_lengths(axis, most_rows, parts), transposed))


def tile_lengths(axis: Axis, most_rows: int, parts: bool) -> IntArray:
    """Lengths that cut the longest residue class evenly: whole strides, and if need be even parts of one."""
    length = -(-axis.size // axis.dilation)
    tile = np.arange(1, min(length, max(most_rows, 1)) + 1)
    pieces = -(-length // tile)
    even = tile[-(-length // pieces) == tile]
    tile = np.where(parts & (axis.stride % even == 0), even, -(-even // axis.stride) * axis.stride)
    return np.unique(np.minimum(tile, length))


class Candidates:
    """All tiles of at most `most_rows` rows that are worth trying; counts have one entry per candidate.

    Attributes:
        tiles: `[candidates, rank]`.
    """

    def __init__(self, geometry: Geometry, most_rows: int, transposed: bool = False):
        self.geometry = geometry
        parts = prod(geometry.stride) > most_rows  # else a stride's queries, whose windows are one, stay together
        self._axes = [count_axis(axis, max(most_rows, SHARED_ROWS), transposed, parts) for axis in geometry.axes]
        rows: IntArray = reduce(np.multiply.outer, [axis.lengths for axis in self._axes])
        self._index = np.nonzero(rows <= most_rows)
        self.tiles = np.stack([axis.lengths[i] for axis, i in zip(self._axes, self._index, strict=True)], 1)

    @property
    def rows(self) -> IntArray:
        """Rows of the largest tile."""
        return self.tiles.prod(1)

    @property
    def columns(self) -> IntArray:
        """Columns of the widest tile."""
        return self._product([axis.most_columns for axis in self._axes])

    @property
    def num_tiles(self) -> IntArray:
        """Tiles of a map."""
        return self._product([axis.num_tiles for axis in self._axes])

    @property
    def col_loads(self) -> IntArray:
        """Columns of all tiles."""
        return self._product([axis.col_loads for axis in self._axes])

    @property
    def scores(self) -> IntArray:
        """Pairs of all tiles."""
        return self._product([axis.scores for axis in self._axes])

    @property
    def launches(self) -> IntArray:
        """Tile classes, each of which a backend may take in one batched product."""
        return self._product([axis.pictures[0] for axis in self._axes])

    @property
    def table_entries(self) -> IntArray:
        """Pairs of all tile classes."""
        return self._product([axis.pictures[1] for axis in self._axes])

    def padded_columns(self, chunk: IntArray) -> IntArray:
        """Columns of all tiles, where those of each are padded to a multiple of the candidate's chunk."""
        columns, tiles = np.ones((2, len(self.tiles), 1), dtype=np.int64)
        for axis, index in zip(self._axes, self._index, strict=True):
            own_columns, own_tiles = (counts[index][:, None] for counts in axis.widths)
            columns = (columns[:, :, None] * own_columns).reshape(len(index), -1)
            tiles = (tiles[:, :, None] * own_tiles).reshape(len(index), -1)
        chunk = chunk[:, None]
        return (tiles * (-(-columns // chunk) * chunk)).sum(1)

    def _product(self, per_axis: list[IntArray]) -> IntArray:
        return reduce(np.multiply, (counts[i] for counts, i in zip(per_axis, self._index, strict=True)))
