"""An axis cut into stretches of rows, which are its tiles: every kind of tile once, and not every tile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dinat_triton.geometry import WRAP, Axis, IntArray, counted

# Of the polynomials by which tiles are told apart, and its inverse modulo 2**64.
FACTOR = 6364136223846793005
INVERSE = pow(FACTOR, -1, 1 << 64) - (1 << 64)


@dataclass(frozen=True, eq=False)
class AxisCuts:
    """An axis cut into tiles of each of some lengths. An entry stands for tiles of one length and one picture.

    Attributes:
        lengths: `[cuts]`: rows of a tile; the last of a residue class may have fewer.
        start, end: Half-open intervals of columns that rows see, of all residue classes one after the other.
        first_residue, residues: Of each residue class, the first and how many.
        cut, residue_class: `[entries]`: which length, and where.
        row: `[entries]`: class index of the first row of its first tile.
        first, past: `[entries]`: where the rows of its first tile are in `start` and `end`.
        number, stop, step: `[entries]`: the range of its tiles, counted from the ends of their residue class.
        turn: Columns after which those of an axis that wraps around begin anew; None on other axes.
    """

    lengths: IntArray
    start: IntArray
    end: IntArray
    first_residue: IntArray
    residues: IntArray
    cut: IntArray
    residue_class: IntArray
    row: IntArray
    first: IntArray
    past: IntArray
    number: IntArray
    stop: IntArray
    step: IntArray
    turn: int | None

    @cached_property
    def rows(self) -> IntArray:
        """`[entries]` of a tile."""
        return self.past - self.first

    @cached_property
    def column(self) -> IntArray:
        """`[entries]`: class index of the first column of its first tile, negative beyond an end that wraps around."""
        return self.start[self.first]

    @cached_property
    def columns(self) -> IntArray:
        """`[entries]` of a tile."""
        return self.end[self.past - 1] - self.column

    @cached_property
    def tiles(self) -> IntArray:
        """`[entries]`: how many there are."""
        return -((self.number - self.stop) // self.step) * self.residues[self.residue_class]

    @cached_property
    def seam(self) -> IntArray:
        """`[entries]`: columns of a tile before those that begin anew; 0 where none do."""
        if self.turn is None:
            return np.zeros_like(self.row)
        last = self.column + self.columns - 1
        return np.where(self.column // self.turn < last // self.turn, self.turn - self.column % self.turn, 0)

    @cached_property
    def pictures(self) -> IntArray:
        """`[marks, entries]`: what tells tiles apart: rows, where the columns begin and wrap, what the rows see."""
        return np.stack((self.rows, self.row - self.column, self.seam, self._hash(self.start), self._hash(self.end)))

    def _hash(self, ends: IntArray) -> IntArray:
        """`[entries]`: of the ends of the rows' intervals, counted from the first column: a polynomial modulo 2**64."""
        powers, inverses = (np.full(len(ends), factor).cumprod() for factor in (FACTOR, INVERSE))
        ones, sums = (np.append(0, x.cumsum()) for x in (powers, ends * powers))
        total = sums[self.past] - sums[self.first] - self.column * (ones[self.past] - ones[self.first])
        return total * inverses[self.first]


def cut_axis(axis: Axis, lengths: IntArray, transposed: bool) -> AxisCuts:
    """Cuts every residue class of an axis into tiles of each length."""
    classes = list(axis.residue_classes())
    starts, ends = zip(*(axis.observers(n) if transposed else axis.windows(n) for n, _ in classes), strict=True)
    sizes = np.array([length for length, _ in classes])
    # One by one near the ends, where tiles have pictures of their own; between, pictures repeat with the stride.
    cut, residue_class = np.divmod(np.arange(len(lengths) * len(classes)), len(classes))
    length, size = lengths[cut], sizes[residue_class]
    end = -(-size // length)
    left = np.minimum(-(-axis.margin // length), end)
    right = np.maximum(left, (size - axis.margin) // length)
    period = axis.stride // np.gcd(axis.stride, length)
    between = np.minimum(period, right - left)
    owner, kind = counted(left + between + end - right)
    left, right, between, length, size = (x[owner] for x in (left, right, between, length, size))
    is_right = kind >= left + between
    number = kind + np.where(is_right, right - left - between, 0)
    row = number * length
    first = row + (sizes.cumsum() - sizes)[residue_class[owner]]
    return AxisCuts(
        lengths,
        np.concatenate(starts),
        np.concatenate(ends),
        np.array([residues[0] for _, residues in classes]),
        np.array([len(residues) for _, residues in classes]),
        cut[owner],
        residue_class[owner],
        row,
        first,
        first + np.minimum(length, size - row),
        number,
        np.where(is_right | (kind < left), number + 1, right),
        period[owner],
        int(sizes[0]) if axis.border == WRAP else None,
    )
