"""A plan as the kernels read it: vectors per tile class, two bases per tile, and runs of tiles, on the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from dinat_triton.geometry import IntArray, outer_sum
from dinat_triton.plan import MASKED, Plan, TileClass

EMPTY = -1  # the offset of a slot without a token
# Arrays begin at multiples of so many numbers, so that kernels can read them 16 bytes at a time.
ALIGNMENT = 16


@dataclass(frozen=True)
class Words:
    """How columns are compared with the first and last that a row sees, on all axes at once.

    A word holds one field per axis, each below a guard bit. With G all guards: a column's word is its place + G, a row's
    are first and last + 2 * G. Differences of a column and both keep all guards exactly if the row sees the column.
    """

    bits: tuple[int, ...]

    @staticmethod
    def of(plan: Plan) -> Words:
        most = (max(tiles.columns for tiles in axis) for axis in zip(*(c.axes for c in plan.classes), strict=True))
        return Words(tuple(n.bit_length() for n in most))

    @property
    def shifts(self) -> list[int]:
        return list(accumulate((n + 1 for n in self.bits[:-1]), initial=0))

    @property
    def guards(self) -> int:
        return sum(1 << (n + shift) for n, shift in zip(self.bits, self.shifts, strict=True))

    @property
    def is_wide(self) -> bool:
        """Whether words need 64 bits."""
        return self.guards >= 1 << 31

    @property
    def nowhere(self) -> int:
        """A place that no row sees."""
        return sum(((1 << n) - 1) << shift for n, shift in zip(self.bits, self.shifts, strict=True))

    def pack(self, per_axis: list[IntArray]) -> IntArray:
        return outer_sum(per_axis, [1 << shift for shift in self.shifts])


@dataclass(frozen=True, eq=False)
class Layout:
    """Index arrays of a plan.

    Attributes:
        rows: `[classes, 4, ROWS]`: offset or EMPTY, bias code, and the first and the last column that a row sees.
        columns: `[classes, 3, max_chunks * CHUNK]`: offset or EMPTY, bias code, and place. Their dtype is that of all
            token addresses.
        guards: Of the words in which rows and columns are compared.
        bases: `[tiles, 2]`: tokens from which offsets of rows and columns count, the tiles of a class in a row.
        runs: `[runs, 4]`: class, first tile, end, chunks. A program walks one run.
        first_run: `[classes + 1]`: where each class's runs begin.
    """

    plan: Plan
    max_chunks: int
    rows: Tensor
    columns: Tensor
    guards: int
    bases: Tensor
    runs: Tensor
    first_run: Tensor

    @property
    def row_slots(self) -> int:
        return self.rows.shape[2]

    @property
    def pairs(self) -> int:
        """(row, column) pairs of one tile class."""
        return self.row_slots * self.columns.shape[2]

    @cached_property
    def members(self) -> Tensor:
        """`[offsets, slots]`: the pairs of all classes that each bias entry is added to, padded with -1."""
        rows, columns = self.row_slots, self.columns.shape[2]
        found = []
        for number, c in enumerate(self.plan.classes):
            column = c.column_of()
            pair = (number * rows + np.arange(column.shape[1])) * columns + column
            found.append(np.where(column == MASKED, -1, pair).astype(np.int32))
        return torch.as_tensor(np.concatenate(found, axis=1), device=self.rows.device)


@lru_cache(maxsize=256)
def layout_of(plan: Plan, tiles_per_run: int, wide: bool, device: torch.device) -> Layout:
    """Lays a plan out.

    Args:
        plan: With `block` and `chunk` as the kernel takes them.
        tiles_per_run: Tiles that a program walks, at most.
        wide: Whether token addresses within a batch item need 64 bits.
        device: Where to.
    """
    words = Words.of(plan)
    tiles, rows, columns = plan.shapes.T
    chunks = -(-columns // plan.chunk)
    max_chunks = int(chunks.max())
    runs, first_run = _runs(tiles, chunks, tiles_per_run)
    bases = [np.stack((c.row_base, c.col_base), 1) for c in plan.classes]
    arrays = (
        np.stack([_rows(c, words, plan.block or int(rows.max())) for c in plan.classes]),
        np.stack([_columns(c, words, max_chunks * plan.chunk) for c in plan.classes]),
        np.concatenate(bases),
        runs,
        first_run,
    )
    placed = _upload(arrays, np.int64 if wide or words.is_wide else np.int32, device)
    return Layout(plan, max_chunks, *placed[:2], words.guards, *placed[2:])


def _rows(c: TileClass, words: Words, slots: int) -> IntArray:
    first, last = words.pack([axis.first for axis in c.axes]), words.pack([axis.last for axis in c.axes])
    fields = np.stack((c.rows, c.row_code, first, last + 2 * words.guards))
    return _padded(fields, slots, (EMPTY, 0, words.nowhere, 2 * words.guards))


def _columns(c: TileClass, words: Words, slots: int) -> IntArray:
    place = words.pack([np.arange(axis.columns) for axis in c.axes]) + words.guards
    fields = np.stack((c.columns, c.col_code, place))
    return _padded(fields, slots, (EMPTY, 0, words.nowhere + words.guards))


def _padded(fields: IntArray, slots: int, empty: tuple[int, ...]) -> IntArray:
    padding = np.repeat(np.array(empty)[:, None], slots - fields.shape[1], 1)
    return np.concatenate((fields, padding), 1)


def _runs(tiles: IntArray, chunks: IntArray, tiles_per_run: int) -> tuple[IntArray, IntArray]:
    """Runs of at most so many tiles of one class, and where the runs of each class begin."""
    count = -(-tiles // tiles_per_run)
    first_run = np.append(0, np.cumsum(count))
    owner = np.repeat(np.arange(len(tiles)), count)
    end = np.cumsum(tiles)
    first = (end - tiles)[owner] + (np.arange(len(owner)) - first_run[owner]) * tiles_per_run
    return np.stack((owner, first, np.minimum(first + tiles_per_run, end[owner]), chunks[owner]), 1), first_run


def _upload(arrays: tuple[IntArray, ...], dtype: type, device: torch.device) -> list[Tensor]:
    """The arrays on the device, as parts of one tensor."""
    starts = list(accumulate((-(-a.size // ALIGNMENT) * ALIGNMENT for a in arrays), initial=0))
    together = np.zeros(starts[-1], dtype=dtype)
    for start, array in zip(starts, arrays, strict=False):
        together[start : start + array.size] = array.ravel()  # words may wrap around: only their bits count
    placed = torch.as_tensor(together, device=device)
    return [placed[start : start + a.size].view(a.shape) for start, a in zip(starts, arrays, strict=False)]
