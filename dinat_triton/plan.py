"""Plans: how a geometry is cut into tiles of rows, and which columns each tile needs.

In a forward plan rows are queries and columns are keys; in a transposed plan (for the gradients of keys and values)
rows are keys and columns are the queries that see them. A backend needs nothing else: it never sees a window.

Along one axis a tile is a run of consecutive class indices of one residue class; its columns are the union of its rows'
intervals, again a run. Tiles whose relative picture is the same (all interior tiles, each kind of border) form a tile
class and share one `rel`, the bias index of each (row, column) pair. In N dimensions all this is a Cartesian product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import ceil, prod

import numpy as np

from dinat_triton.geometry import Axis, Geometry, IntArray, broadcast_ints, outer_index

MASKED = -1  # in rel: the row does not see this column
PADDING = -1  # in tokens: an empty slot of a tile


@dataclass(frozen=True)
class AxisTiles:
    """The tiles of one class along one axis: a shared picture and where each tile lies."""

    rel: IntArray  # [rows, columns] bias index on this axis, or MASKED
    row_start: IntArray  # [tiles] position of each tile's first row
    col_start: IntArray  # [tiles] position of each tile's first column
    dilation: int

    def rows(self) -> IntArray:
        """Positions `[tiles, rows]`."""
        return self.row_start[:, None] + self.dilation * np.arange(self.rel.shape[0])

    def columns(self) -> IntArray:
        """Positions `[tiles, columns]`."""
        return self.col_start[:, None] + self.dilation * np.arange(self.rel.shape[1])

    @property
    def num_tiles(self) -> int:
        return len(self.row_start)


@lru_cache(maxsize=1024)
def tile_axis(axis: Axis, tile: int, transposed: bool = False) -> tuple[AxisTiles, ...]:
    """Cuts every residue class of an axis into runs of `tile` rows, grouped by their relative picture."""
    classes: dict[bytes, list] = {}
    for length, residues in axis.residue_classes():
        start, end = (axis.observers if transposed else axis.windows)(length)
        for first in range(0, length, tile):
            rows = np.arange(first, min(first + tile, length))[:, None]
            columns = np.arange(start[rows[0, 0]], end[rows[-1, 0]])[None]
            seen = (columns >= start[rows]) & (columns < end[rows])
            offset = axis.offset(rows, columns) if transposed else axis.offset(columns, rows)
            rel = np.where(seen, offset, MASKED)
            picture = classes.setdefault(bytes(rel) + bytes(np.array(rel.shape)), [rel, [], []])
            picture[1].append(residues + first * axis.dilation)
            picture[2].append(residues + columns[0, 0] * axis.dilation)
    return tuple(
        AxisTiles(rel, np.concatenate(rows), np.concatenate(columns), axis.dilation)
        for rel, rows, columns in classes.values()
    )


@dataclass(frozen=True)
class TileClass:
    """Tiles with the same relative picture."""

    row_tokens: IntArray  # [tiles, rows] token of each row, or PADDING
    col_tokens: IntArray  # [tiles, columns] token of each column, or PADDING
    rel: IntArray  # [rows, columns] bias index of each pair, or MASKED


@dataclass(frozen=True)
class Cost:
    """What running a plan once costs, for one head of one batch item unless said otherwise.

    Attributes:
        queries: Rows with a token.
        scores: Scores evaluated, padding included.
        useful_scores: Scores that attend.
        col_loads: Tokens loaded as columns; more than `queries` where tiles overlap.
        table_entries: Entries of the bias table that the tile classes share.
        launches: Batched products a backend issues when it takes one class at a time; a fused kernel takes all in one.
    """

    queries: int
    scores: int
    useful_scores: int
    col_loads: int
    table_entries: int
    launches: int

    @property
    def scores_per_query(self) -> float:
        return self.scores / self.queries

    @property
    def useful_per_query(self) -> float:
        return self.useful_scores / self.queries

    def bytes(self, batch: int, heads: int, dim: int, itemsize: int) -> tuple[int, int]:
        """Bytes of a forward: the floor (q, k, v, out once each), and what the tiles load and store, table included."""
        token = batch * heads * dim * itemsize
        return 4 * self.queries * token, 2 * (self.queries + self.col_loads) * token + 4 * heads * self.table_entries


@dataclass(frozen=True)
class Plan:
    """Tiles of a geometry.

    Args:
        geometry: The problem.
        tile: Rows of a tile along each axis, in class indices. An axis shorter than that is one tile.
        block: Row slots every tile is padded to; by default each class has exactly its rows.
        chunk: Columns are padded to a multiple of this.
        transposed: Rows are keys and columns the queries that see them.
    """

    geometry: Geometry
    tile: tuple[int, ...]
    block: int | None = None
    chunk: int = 1
    transposed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", broadcast_ints("tile", self.tile, self.geometry.rank))
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")
        if self.block is not None and self.block < self.largest[0]:
            raise ValueError(f"block must hold the {self.largest[0]} rows of a {self.tile} tile, got {self.block}")

    def _combinations(self) -> list[tuple[AxisTiles, ...]]:
        """The tile classes as one class per axis each."""
        per_axis = [tile_axis(axis, t, self.transposed) for axis, t in zip(self.geometry.axes, self.tile, strict=True)]
        return [tuple(per_axis[a][i] for a, i in enumerate(index)) for index in np.ndindex(*map(len, per_axis))]

    def _padded(self, combination: Sequence[AxisTiles]) -> tuple[int, int]:
        """Row slots and columns of a tile of this class, padding included."""
        rows, columns = _cells(combination)
        return self.block or rows, ceil(columns / self.chunk) * self.chunk

    @property
    def largest(self) -> tuple[int, int]:
        """The most rows and the most columns of any tile, without padding."""
        rows, columns = zip(*map(_cells, self._combinations()), strict=True)
        return max(rows), max(columns)

    @property
    def is_closed(self) -> bool:
        """Whether no two tiles share a column: a tile is then a whole problem of its own."""
        return self.cost().col_loads == self.geometry.num_tokens

    @cached_property
    def classes(self) -> tuple[TileClass, ...]:
        shape, bias_shape = self.geometry.shape, self.geometry.bias_shape
        classes = []
        for combination in self._combinations():
            rows, columns = self._padded(combination)
            row_tokens = outer_index([tiles.rows() for tiles in combination], shape)
            col_tokens = outer_index([tiles.columns() for tiles in combination], shape)
            rel = outer_index([tiles.rel for tiles in combination], bias_shape)
            pad_rows, pad_columns = rows - row_tokens.shape[1], columns - col_tokens.shape[1]
            classes.append(
                TileClass(
                    np.pad(row_tokens, ((0, 0), (0, pad_rows)), constant_values=PADDING),
                    np.pad(col_tokens, ((0, 0), (0, pad_columns)), constant_values=PADDING),
                    np.pad(rel, ((0, pad_rows), (0, pad_columns)), constant_values=MASKED),
                )
            )
        return tuple(classes)

    def cost(self) -> Cost:
        """Counts work from the axes alone, without building the token arrays."""
        scores = col_loads = entries = 0
        combinations = self._combinations()
        for combination in combinations:
            tiles = prod(axis.num_tiles for axis in combination)
            rows, columns = self._padded(combination)
            scores += tiles * rows * columns
            col_loads += tiles * _cells(combination)[1]
            entries += rows * columns
        return Cost(
            queries=self.geometry.num_tokens,
            scores=scores,
            useful_scores=self.geometry.num_pairs,
            col_loads=col_loads,
            table_entries=entries,
            launches=len(combinations),
        )


def _cells(combination: Sequence[AxisTiles]) -> tuple[int, int]:
    """Rows and columns of a tile that has these axis tiles."""
    rows, columns = zip(*(tiles.rel.shape for tiles in combination), strict=True)
    return prod(rows), prod(columns)


def tile_candidates(geometry: Geometry, most_rows: int) -> list[tuple[int, ...]]:
    """Tiles worth trying: runs that cut the longest residue class evenly and keep a stride's queries together."""
    per_axis = []
    for axis in geometry.axes:
        length = ceil(axis.size / axis.dilation)
        even = {ceil(length / n) for n in range(1, length + 1)}
        aligned = {min(ceil(run / axis.stride) * axis.stride, length) for run in even}
        per_axis.append(sorted(aligned))
    return [tile for tile in product(*per_axis) if prod(tile) <= most_rows] or [tuple(runs[0] for runs in per_axis)]
