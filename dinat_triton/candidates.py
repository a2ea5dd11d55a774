"""Tiles worth trying for a geometry, and what each would cost: arithmetic on counts per axis, with no plan built.

A plan is a product over axes, and so are its counts. Each axis is cut into runs of every length worth trying at once;
what that gives is shared by all geometries, passes and maps that have such an axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import numpy as np

from dinat_triton.geometry import Axis, Geometry, IntArray

# Axes are cut for tiles of so many rows at least, so that passes with smaller tiles share what was counted.
SHARED_ROWS = 64


@dataclass(frozen=True, eq=False)
class AxisRuns:
    """An axis cut into runs of several lengths. Each entry stands for tiles of one shape under one of the lengths."""

    lengths: IntArray  # [runs]
    run: IntArray  # [entries] which length
    rows: IntArray  # [entries] of a tile
    columns: IntArray  # [entries] of a tile
    tiles: IntArray  # [entries] how many there are
    picture: IntArray  # [marks, entries] what tells tiles of a shape apart: where the windows lie and how long they are

    @cached_property
    def col_loads(self) -> IntArray:
        """`[runs]`: columns of all tiles."""
        return self._sum(self.tiles * self.columns)

    @cached_property
    def scores(self) -> IntArray:
        """`[runs]`: pairs of all tiles."""
        return self._sum(self.tiles * self.rows * self.columns)

    @cached_property
    def most_columns(self) -> IntArray:
        """`[runs]`: columns of the widest tile."""
        return self.widths[0].max(1)

    @cached_property
    def pictures(self) -> tuple[IntArray, IntArray]:
        """`[runs]`: different tiles, and their pairs."""
        marks = np.stack((self.rows, self.columns, *self.picture, self.run))
        marks = marks[:, np.lexsort(marks)]
        rows, columns, *_, run = marks[:, np.append(True, (np.diff(marks) != 0).any(0))]
        return np.bincount(run), np.bincount(run, rows * columns).astype(np.int64)

    @cached_property
    def widths(self) -> tuple[IntArray, IntArray]:
        """`[runs, widths]`: the different numbers of columns that tiles have, and how many have each; padded with 0."""
        spread = int(self.columns.max()) + 1
        key, index = np.unique(self.run * spread + self.columns, return_inverse=True)
        run, column = key // spread, key % spread
        place = np.arange(len(key)) - np.searchsorted(run, run)
        columns, tiles = np.zeros((2, len(self.lengths), int(place.max()) + 1), dtype=np.int64)
        columns[run, place] = column
        tiles[run, place] = np.bincount(index.ravel(), self.tiles)
        return columns, tiles

    def _sum(self, counts: IntArray) -> IntArray:
        return np.bincount(self.run, counts).astype(np.int64)


@lru_cache(maxsize=512)
def cut_axis(axis: Axis, most_rows: int, transposed: bool = False) -> AxisRuns:
    """Cuts an axis into runs of all lengths worth trying, each kind of tile once and not each tile."""
    lengths = run_lengths(axis, most_rows)
    parts = []
    for length, residues in axis.residue_classes():
        start, end = axis.observers(length) if transposed else axis.windows(length)
        margin, tiles = axis.border, -(-length // lengths)
        # Tiles near the ends one by one, and one for all between: runs keep a stride's queries together.
        left = np.minimum(-(-margin // lengths), tiles)
        right = np.maximum(left, (length - margin) // lengths)
        inner = right > left
        kinds = left + inner + tiles - right
        run = np.repeat(np.arange(len(lengths)), kinds)
        kind = np.arange(len(run)) - np.repeat(np.cumsum(kinds) - kinds, kinds)
        stands_for_all = inner[run] & (kind == left[run])
        skipped = (right - left - inner)[run]
        number = kind + np.where(kind >= (left + inner)[run], skipped, 0)
        first = number * lengths[run]
        past = np.minimum(first + lengths[run], length)
        rows, column = past - first, start[first]
        count = np.where(stands_for_all, skipped + 1, 1) * len(residues)
        starts, lengths_seen = (np.append(0, np.cumsum(x)) for x in (start, end - start))
        ahead = starts[past] - starts[first] - rows * column
        picture = np.stack((first - column, ahead, lengths_seen[past] - lengths_seen[first]))
        parts.append((run, rows, end[past - 1] - column, count, picture))
    return AxisRuns(lengths, *(np.concatenate(part, axis=-1) for part in zip(*parts, strict=True)))


def run_lengths(axis: Axis, most_rows: int) -> IntArray:
    """Runs that cut the longest residue class evenly and keep a stride's queries together."""
    length = -(-axis.size // axis.dilation)
    run = np.arange(1, min(length, max(most_rows, 1)) + 1)
    pieces = -(-length // run)
    even = run[-(-length // pieces) == run]
    return np.unique(np.minimum(-(-even // axis.stride) * axis.stride, length))


class Candidates:
    """All tiles of at most `most_rows` rows that are worth trying; counts have one entry per candidate.

    Attributes:
        tiles: `[candidates, rank]`.
    """

    def __init__(self, geometry: Geometry, most_rows: int, transposed: bool = False):
        self.geometry = geometry
        self._axes = [cut_axis(axis, max(most_rows, SHARED_ROWS), transposed) for axis in geometry.axes]
        index = np.indices([len(axis.lengths) for axis in self._axes]).reshape(geometry.rank, -1)
        fits = np.prod([axis.lengths[i] for axis, i in zip(self._axes, index, strict=True)], axis=0) <= most_rows
        self._index = index[:, fits] if fits.any() else index[:, :1]
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
        return prod(counts[i] for counts, i in zip(per_axis, self._index, strict=True))
