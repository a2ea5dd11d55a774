"""Tiles worth trying for a geometry, and what each would cost: arithmetic on counts per axis, with no plan built.

A plan is a product over axes, and so are its counts. Each axis is cut into runs of every length worth trying at once;
what that gives is shared by all geometries, passes and maps that have such an axis.
"""

from __future__ import annotations

from functools import cached_property, lru_cache, reduce
from math import prod

import numpy as np

from dinat_triton.geometry import Axis, Geometry, IntArray, counted
from dinat_triton.runs import Runs, cut

# Axes are cut for tiles of so many rows at least, so that passes with smaller tiles share what was counted.
SHARED_ROWS = 64


class AxisCounts:
    """Counts of an axis that is cut into runs of each length worth trying, `[lengths]` each."""

    def __init__(self, runs: Runs):
        self._runs, self.lengths = runs, runs.lengths

    @cached_property
    def num_tiles(self) -> IntArray:
        """Tiles."""
        return self._sum(self._runs.tiles)

    @cached_property
    def col_loads(self) -> IntArray:
        """Columns of all tiles."""
        return self._sum(self._runs.tiles * self._runs.columns)

    @cached_property
    def scores(self) -> IntArray:
        """Pairs of all tiles."""
        return self._sum(self._runs.tiles * self._runs.rows * self._runs.columns)

    @cached_property
    def most_columns(self) -> IntArray:
        """Columns of the widest tile."""
        return np.maximum.reduceat(self._runs.columns, np.searchsorted(self._runs.run, np.arange(len(self.lengths))))

    @cached_property
    def pictures(self) -> tuple[IntArray, IntArray]:
        """Different tiles, and their pairs."""
        marks = np.array((*self._runs.pictures, self._runs.run))
        order = np.lexsort(marks)
        different = order[np.append(True, (np.diff(marks[:, order]) != 0).any(0))]
        run, pairs = self._runs.run[different], (self._runs.rows * self._runs.columns)[different]
        return np.bincount(run), np.bincount(run, pairs).astype(np.int64)

    @cached_property
    def widths(self) -> tuple[IntArray, IntArray]:
        """`[lengths, widths]`: the numbers of columns that tiles have, and how many have each; padded with 0."""
        spread = int(self._runs.columns.max()) + 1
        found, kind = np.unique(self._runs.run * spread + self._runs.columns, return_inverse=True)
        run, column = np.divmod(found, spread)
        _, place = counted(np.bincount(run))
        columns, tiles = np.zeros((2, len(self.lengths), int(place.max()) + 1), dtype=np.int64)
        columns[run, place], tiles[run, place] = column, np.bincount(kind, self._runs.tiles)
        return columns, tiles

    def _sum(self, counts: IntArray) -> IntArray:
        return np.bincount(self._runs.run, counts).astype(np.int64)


@lru_cache(maxsize=256)
def count_axis(axis: Axis, most_rows: int, transposed: bool = False, parts: bool = False) -> AxisCounts:
    """Counts of an axis under each run of at most so many rows that is worth trying."""
    return AxisCounts(cut(axis, run_lengths(axis, most_rows, parts), transposed))


def run_lengths(axis: Axis, most_rows: int, parts: bool) -> IntArray:
    """Runs that cut the longest residue class evenly: of whole strides, and if need be of even parts of one."""
    length = -(-axis.size // axis.dilation)
    run = np.arange(1, min(length, max(most_rows, 1)) + 1)
    pieces = -(-length // run)
    even = run[-(-length // pieces) == run]
    run = np.where(parts & (axis.stride % even == 0), even, -(-even // axis.stride) * axis.stride)
    return np.unique(np.minimum(run, length))


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
