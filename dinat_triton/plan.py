"""Plans: how a geometry is cut into tiles of rows, and which columns each tile needs.

In a forward plan rows are queries and columns are keys; in a transposed plan (for the gradients of keys and values)
rows are keys and columns are the queries that see them. A backend needs nothing else: it never sees a window.

Along one axis a tile is a stretch of consecutive class indices of one residue class; its columns are the union of its
rows' intervals, again a stretch. Where an axis wraps around, one of columns may pass an end, and a long one names a
token more than once: still every row sees each of its keys in one column. Tiles with the same relative picture (all
interior tiles, each kind of border) form a tile class and are translations of one another: a token is its tile's base
plus an offset of the class. In N dimensions all this is a Cartesian product, so a plan keeps vectors and never a matrix
of tiles and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import prod

import numpy as np

from dinat_triton.axis_cuts import AxisCuts, cut_axis
from dinat_triton.geometry import (
    Axis,
    Geometry,
    IntArray,
    broadcast_ints,
    counted,
    outer_index,
    outer_sum,
)

MASKED = -1  # in rel: the row does not see this column


@dataclass(frozen=True, eq=False)
class AxisTiles:
    """The tiles of one class along one axis: the picture they share, and where each of them lies.

    Attributes:
        first: `[rows]`: the first column that each row sees, counted from the tile's first column.
        last: `[rows]`: the last one.
        col_offset: `[columns]`: positions from the tile's first column to each; backwards where an axis wraps around.
        row_code, col_code: `[rows]` and `[columns]`: the bias index of a pair is the sum of its two codes.
        row_start, col_start: `[tiles]`: position of each tile's first row and first column.
    """

    first: IntArray
    last: IntArray
    col_offset: IntArray
    row_code: IntArray
    col_code: IntArray
    row_start: IntArray
    col_start: IntArray

    @property
    def rows(self) -> int:
        return len(self.first)

    @property
    def columns(self) -> int:
        return len(self.col_offset)

    @property
    def tiles(self) -> int:
        return len(self.row_start)

    def rel(self) -> IntArray:
        """Bias index of each pair on this axis, `[rows, columns]`, or MASKED."""
        column = np.arange(self.columns)
        seen = (column >= self.first[:, None]) & (column <= self.last[:, None])
        return np.where(seen, self.row_code[:, None] + self.col_code, MASKED)


@dataclass(frozen=True, eq=False)
class AxisPlan:
    """All tiles along one axis: what `AxisTiles` has of one class, of all classes, one after the other.

    Attributes:
        rows, columns, tiles: `[classes]`: how many each has.
    """

    rows: IntArray
    columns: IntArray
    tiles: IntArray
    first: IntArray
    last: IntArray
    col_offset: IntArray
    row_code: IntArray
    col_code: IntArray
    row_start: IntArray
    col_start: IntArray

    @cached_property
    def each_row(self) -> tuple[IntArray, IntArray]:
        """The class of every row, and its number there."""
        return counted(self.rows)

    @cached_property
    def each_column(self) -> tuple[IntArray, IntArray]:
        """The class of every column, and its number there."""
        return counted(self.columns)

    @cached_property
    def classes(self) -> tuple[AxisTiles, ...]:
        """Each class by itself."""
        r, c, t = (counts.cumsum()[:-1] for counts in (self.rows, self.columns, self.tiles))
        ends = {"first": r, "last": r, "col_offset": c, "row_code": r, "col_code": c, "row_start": t, "col_start": t}
        parts = zip(*(np.split(getattr(self, name), of) for name, of in ends.items()), strict=True)
        return tuple(AxisTiles(*vectors) for vectors in parts)


@lru_cache(maxsize=256)
def plan_axis(axis: Axis, tile: int, transposed: bool = False) -> AxisPlan:
    """Cuts every residue class of an axis into stretches of `tile` rows, grouped by their relative picture."""
    cuts = cut_axis(axis, np.array([tile]), transposed)
    kind, chosen = _group(cuts)
    rows, columns, ahead = cuts.rows[chosen], cuts.columns[chosen], (cuts.row - cuts.column)[chosen]
    (of_row, row), (of_column, column) = counted(rows), counted(columns)
    seen_from, at = cuts.column[chosen][of_row], cuts.first[chosen][of_row] + row
    row_index, origin = row + ahead[of_row], np.zeros(1, dtype=np.int64)
    row_code, col_code = -row_index, axis.offset(column, origin)
    if transposed:
        row_code, col_code = axis.offset(row_index, origin), -column
    of_tile, row_start = _starts(axis, cuts, kind)
    col_start = (row_start - ahead[of_tile] * axis.dilation) % axis.size
    tiles = np.bincount(of_tile)
    anchor = col_start[tiles.cumsum() - tiles][of_column]
    col_offset = (anchor + column * axis.dilation) % axis.size - anchor
    first, last = cuts.start[at] - seen_from, cuts.end[at] - seen_from - 1
    return AxisPlan(rows, columns, tiles, first, last, col_offset, row_code, col_code, row_start, col_start)


def _group(cuts: AxisCuts) -> tuple[IntArray, IntArray]:
    """Groups entries by their picture: the class of each, and the first of each class.

    A picture is where its first row lies from its first column, where its columns wrap around, and what its rows see.
    """
    kinds: dict[tuple[int, int, bytes, bytes], int] = {}
    places = zip(cuts.row.tolist(), cuts.column.tolist(), cuts.seam.tolist(), cuts.first, cuts.past, strict=True)
    kind = [
        kinds.setdefault(
            (row - column, seam, (cuts.start[at:past] - column).tobytes(), (cuts.end[at:past] - column).tobytes()),
            len(kinds),
        )
        for row, column, seam, at, past in places
    ]
    return np.array(kind), np.unique(kind, return_index=True)[1]


def _starts(axis: Axis, cuts: AxisCuts, kind: IntArray) -> tuple[IntArray, IntArray]:
    """The class and the first row's position of every tile, class by class."""
    entries = np.argsort(kind, kind="stable")
    entry, place = counted(cuts.tiles[entries])
    entry = entries[entry]
    number, residue = np.divmod(place, cuts.residues[cuts.residue_class[entry]])
    row = (cuts.number[entry] + number * cuts.step[entry]) * cuts.lengths[0]
    return kind[entry], row * axis.dilation + cuts.first_residue[cuts.residue_class[entry]] + residue


@dataclass(frozen=True, eq=False)
class TileClass:
    """Tiles that are translations of one another: the product of one class per axis."""

    geometry: Geometry
    axes: tuple[AxisTiles, ...]

    @cached_property
    def rows(self) -> IntArray:
        """`[rows]`: tokens from a tile's base to each row."""
        steps = zip(self.axes, self.geometry.dilation, strict=True)
        return outer_sum([np.arange(axis.rows) * dilation for axis, dilation in steps], self.geometry.token_strides)

    @cached_property
    def columns(self) -> IntArray:
        """`[columns]`: tokens from a tile's column base to each column."""
        return outer_sum([axis.col_offset for axis in self.axes], self.geometry.token_strides)

    @cached_property
    def row_base(self) -> IntArray:
        """`[tiles]`: the token that the offsets of each tile's rows count from."""
        return outer_sum([axis.row_start for axis in self.axes], self.geometry.token_strides)

    @cached_property
    def col_base(self) -> IntArray:
        """`[tiles]`: the token that the offsets of each tile's columns count from."""
        return outer_sum([axis.col_start for axis in self.axes], self.geometry.token_strides)

    @property
    def tiles(self) -> int:
        return prod(axis.tiles for axis in self.axes)

    def rel(self) -> IntArray:
        """Bias index of each pair, `[rows, columns]`, or MASKED, written out."""
        return outer_index([axis.rel() for axis in self.axes], self.geometry.bias_shape)


@dataclass(frozen=True)
class Cost:
    """Work of running a plan once, for one head of one batch item unless said otherwise.

    Attributes:
        queries: Rows with a token.
        scores: Scores evaluated, padding included.
        useful_scores: Scores that attend.
        col_loads: Tokens loaded as columns; more than `queries` where tiles overlap.
        table_entries: Pairs of all tile classes: entries of a bias table.
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

    @cached_property
    def axes(self) -> tuple[AxisPlan, ...]:
        """The tiles along each axis."""
        axes = zip(self.geometry.axes, self.tile, strict=True)
        return tuple(plan_axis(axis, tile, self.transposed) for axis, tile in axes)

    def each_class(self) -> Iterator[TileClass]:
        """Yields the product of the axes' classes."""
        for classes in product(*(axis.classes for axis in self.axes)):
            yield TileClass(self.geometry, classes)

    @cached_property
    def classes(self) -> tuple[TileClass, ...]:
        return tuple(self.each_class())

    @cached_property
    def shapes(self) -> IntArray:
        """`[classes, 3]`: tiles, rows and columns of each class, without padding."""
        shapes = np.ones((1, 3), dtype=np.int64)
        for axis in self.axes:
            own = np.stack((axis.tiles, axis.rows, axis.columns), 1)
            shapes = (shapes[:, None] * own).reshape(-1, 3)
        return shapes

    @property
    def num_tiles(self) -> int:
        return int(self.shapes[:, 0].sum())

    @property
    def largest(self) -> tuple[int, int]:
        """The most rows and the most columns of any tile, without padding."""
        _, rows, columns = self.shapes.max(0).tolist()
        return rows, columns

    @property
    def is_closed(self) -> bool:
        """Whether no two tiles share a column: a tile is then a whole problem of its own."""
        tiles, _, columns = self.shapes.T
        return int((tiles * columns).sum()) == self.geometry.num_tokens

    def cost(self) -> Cost:
        """Work, counted from the axes alone."""
        tiles, rows, columns = self.shapes.T
        slots = (rows if self.block is None else self.block) * (-(-columns // self.chunk) * self.chunk)
        return Cost(
            queries=self.geometry.num_tokens,
            scores=int((tiles * slots).sum()),
            useful_scores=self.geometry.num_pairs,
            col_loads=int((tiles * columns).sum()),
            table_entries=int(slots.sum()),
            launches=len(tiles),
        )
