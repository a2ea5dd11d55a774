"""A plan as the kernels read it: vectors per tile class, two bases per tile, and runs of tiles, on the device.

A class is a product of one class per axis. All arrays are worked out for all classes at once: the number of a row,
column or tile is taken apart into its place on each axis, and what the axes hold there is added up.

Of a batch of maps these are the tiles of all maps, and the classes of all sizes, each kind of class once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinat_triton.geometry import IntArray, counted, row_major_strides
from dinat_triton.kernels.kept import Kept
from dinat_triton.kernels.map_plans import MapPlans, SizePlan, alone
from dinat_triton.plan import AxisPlan, Plan

EMPTY = -(2**31)  # the offset of a slot without a token: negative from every base
# Arrays begin at multiples of so many numbers, so that kernels can read them 16 bytes at a time.
ALIGNMENT = 16
# Bits of a word. All columns have the first of them and all rows the second; empty slots have all, so that nobody sees
# them, and they see nobody.
WORD_BITS, COLUMN_BIT, ROW_BIT = 32, 1, 2


@dataclass(frozen=True, eq=False)
class Layout:
    """Index arrays of a plan.

    A row sees a column if their words share no bit. On each axis a row has the bit of its window there, and a column
    those of the windows that it is not in. One axis may have more windows than a word has bits: on that one a column's
    place is compared with the row's first.

    Attributes:
        distinct: `[classes]`: the number of each among the classes of all sizes.
        has_long_axis: Whether there is an axis that words leave out.
        codes: `[classes, ROWS]` and `[classes, max_chunks * CHUNK]`: bias codes; none where there is no bias.
        rows: `[classes, fields, ROWS]`: offset or EMPTY, and word; with a long axis the row's first column there and
            their number.
        columns: `[classes, fields, max_chunks * CHUNK]`: offset or EMPTY, and word; with a long axis the column's place
            there. Their dtype is that of all token addresses.
        bases: `[tiles, 2]`: tokens from which offsets of rows and columns count, the tiles of a class in a row.
        runs: `[runs, 4]`: class, first tile, end, chunks. A program walks one run.
        first_run: `[classes + 1]`: where each class's runs begin.
    """

    plan: Plan | MapPlans
    distinct: IntArray
    max_chunks: int
    has_long_axis: bool
    codes: tuple[Tensor, ...]
    rows: Tensor
    columns: Tensor
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
    def entries(self) -> tuple[Tensor, Tensor]:
        """`[classes, offsets]` and `[classes, ROWS]`: a row has a bias entry with the column that is their sum.

        If it has the entry at all: else the sum may be another column, or none.
        """
        parts = [_entries(size.plan, self.row_slots) for size in _sizes(self.plan)]
        entry, row = (np.concatenate(x)[self.distinct] for x in zip(*parts, strict=True))
        return torch.as_tensor(entry, device=self.rows.device), torch.as_tensor(row, device=self.rows.device)


def _lay_out(plan: Plan | MapPlans, tiles_per_run: int, biased: bool, wide: bool, device: torch.device) -> Layout:
    """Lays a plan out.

    Args:
        plan: With `block` and `chunk` as the kernel takes them.
        tiles_per_run: Tiles that a program walks, at most.
        biased: Whether there is a bias.
        wide: Whether token addresses within a batch item need 64 bits.
        device: Where to.
    """
    sizes = _sizes(plan)
    most_rows, most_columns = plan.largest
    max_chunks = -(-most_columns // plan.chunk)
    windows = [[_windows(axis) for axis in size.plan.axes] for size in sizes]
    shifts = _shifts(windows)
    rows, columns = (
        np.concatenate([of(size, slots, own, shifts) for size, own in zip(sizes, windows, strict=True)])
        for of, slots in ((_rows, plan.block or most_rows), (_columns, max_chunks * plan.chunk))
    )
    distinct, alike = _distinct(rows, columns) if len(sizes) > 1 else 2 * (np.arange(len(rows)),)
    owner, bases = _bases(sizes)
    owner = alike[owner]
    order = np.argsort(owner, kind="stable")
    chunks = -(-np.concatenate([size.plan.shapes[:, 2] for size in sizes]) // plan.chunk)
    runs, first_run = _runs(np.bincount(owner), chunks[distinct], tiles_per_run)
    rows, columns = rows[distinct], columns[distinct]
    arrays = [rows[:, :-1], columns[:, :-1], bases[order], runs, first_run]
    arrays += [rows[:, -1], columns[:, -1]] if biased else []
    uploaded = _upload(arrays, np.int64 if wide else np.int32, device)
    return Layout(plan, distinct, max_chunks, None in shifts, tuple(uploaded[5:]), *uploaded[:5])


# Passes of one call share layouts, and so do batches of many sizes.
layout_of = Kept(_lay_out, lambda layout: layout.rows.untyped_storage().nbytes(), most=128, most_bytes=16 << 20)


def _sizes(plan: Plan | MapPlans) -> tuple[SizePlan, ...]:
    return (alone(plan) if isinstance(plan, Plan) else plan).sizes


def _distinct(rows: IntArray, columns: IntArray) -> tuple[IntArray, IntArray]:
    """The first of every kind of class, and the place of each class's kind among them."""
    kinds: dict[bytes, int] = {}
    alike = [kinds.setdefault(r.tobytes() + c.tobytes(), len(kinds)) for r, c in zip(rows, columns, strict=True)]
    return np.unique(alike, return_index=True)[1], np.array(alike)


def _windows(axis: AxisPlan) -> IntArray:
    """The number of each row's window on an axis, counted over the different windows of its class."""
    number = np.zeros(len(axis.first), dtype=np.int64)
    number[1:] = ((axis.first[1:] != axis.first[:-1]) | (axis.last[1:] != axis.last[:-1])).cumsum()
    return number - number[axis.rows.cumsum() - axis.rows].repeat(axis.rows)


def _windows_without(axis: AxisPlan, windows: IntArray) -> IntArray:
    """Bits of the windows that each column of an axis is not in: all before some, and all from some on."""
    (row_class, _), (column_class, column) = axis.each_row, axis.each_column
    apart, ends = column.max() + 1, axis.rows.cumsum()
    count = windows[ends - 1][column_class] + 1
    above, here = row_class * apart, column + column_class * apart

    def bit(row: IntArray) -> IntArray:
        return 1 << np.where(row == ends[column_class], count, windows.take(row, mode="clip"))

    # Both ends of windows rise from row to row.
    first_seen = bit(np.searchsorted(axis.last + above, here))
    first_behind = bit(np.searchsorted(axis.first + above, here, "right"))
    return (1 << count) - 1 - (first_behind - first_seen)


def _shifts(windows: list[list[IntArray]]) -> list[int | None]:
    """The first bit of each axis in a word, behind one for columns and one for rows; None for a long axis."""
    counts = [max(int(window.max()) + 1 for window in axis) for axis in zip(*windows, strict=True)]
    long = counts.index(max(counts)) if 2 + sum(counts) > WORD_BITS else None
    starts = accumulate((0 if axis == long else n for axis, n in enumerate(counts)), initial=2)
    return [None if axis == long else start for axis, start in zip(range(len(counts)), starts, strict=False)]


def _rows(size: SizePlan, slots: int, windows: list[IntArray], shifts: list[int | None]) -> IntArray:
    """`[classes, fields, slots]`: the rows of all classes, bias codes last."""
    fields = []
    for axis, dilation, window, shift in zip(size.plan.axes, size.plan.geometry.dilation, windows, shifts, strict=True):
        (_, number), none = axis.each_row, np.zeros_like(axis.first)
        sight = [none if shift is None else 1 << shift + window]
        if None in shifts:
            sight += [none, none] if shift is not None else [axis.first, axis.last - axis.first + 1]
        fields.append([number * dilation, *sight, axis.row_code])
    return _slots(size, "rows", slots, fields, ROW_BIT)


def _columns(size: SizePlan, slots: int, windows: list[IntArray], shifts: list[int | None]) -> IntArray:
    """`[classes, fields, slots]`: the columns of all classes, bias codes last."""
    fields = []
    for axis, window, shift in zip(size.plan.axes, windows, shifts, strict=True):
        (_, number), none = axis.each_column, np.zeros_like(axis.col_offset)
        sight = [none if shift is None else _windows_without(axis, window) << shift]
        if None in shifts:
            sight += [none] if shift is not None else [number]
        fields.append([axis.col_offset, *sight, axis.col_code])
    return _slots(size, "columns", slots, fields, COLUMN_BIT)


def _slots(size: SizePlan, of: str, slots: int, per_axis: list[list[IntArray]], bit: int) -> IntArray:
    """Adds the fields up over the axes, for every slot of every class."""
    plan = size.plan
    places, filled = _places(plan, of, _kinds(plan)[:, :, None], np.arange(slots))
    strides = size.token_strides, row_major_strides(plan.geometry.bias_shape)
    total: IntArray = np.zeros((len(per_axis[0]), *filled.shape), dtype=np.int64)
    for (offset, *sight, code), place, step, bias_stride in zip(per_axis, places, *strides, strict=True):
        total += np.array((offset * step, *sight, code * bias_stride)).take(place, axis=1)
    total[1] += bit
    empty = np.zeros((len(total), 1, 1), dtype=np.int64)
    empty[:2, 0, 0] = EMPTY, -1
    return np.where(filled, total, empty).swapaxes(0, 1)


def _bases(sizes: tuple[SizePlan, ...]) -> tuple[IntArray, IntArray]:
    """The class of every tile of every map, counted over the classes of all sizes, and its bases, `[tiles, 2]`."""
    owners, bases, classes = [], [], 0
    for size in sizes:
        plan, maps = size.plan, np.array(size.first_tokens)
        owner, number = counted(plan.shapes[:, 0])
        places, _ = _places(plan, "tiles", _kinds(plan)[:, owner], number)
        own = np.zeros((2, len(owner)), dtype=np.int64)
        for axis, place, stride in zip(plan.axes, places, size.token_strides, strict=True):
            own += np.array((axis.row_start, axis.col_start)).take(place, axis=1) * stride
        owners.append(np.tile(owner + classes, len(maps)))
        bases.append((own.T + maps[:, None, None]).reshape(-1, 2))
        classes += len(plan.shapes)
    return np.concatenate(owners), np.concatenate(bases)


def _runs(tiles: IntArray, chunks: IntArray, tiles_per_run: int) -> tuple[IntArray, IntArray]:
    """Runs of at most so many tiles of one class, and where the runs of each class begin."""
    count = -(-tiles // tiles_per_run)
    owner, number = counted(count)
    end = tiles.cumsum()[owner]
    first = end - tiles[owner] + number * tiles_per_run
    runs = np.stack((owner, first, np.minimum(first + tiles_per_run, end), chunks[owner]), 1)
    return runs, np.append(0, count.cumsum())


def _entries(plan: Plan, slots: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """On each axis a row's bias indices and its columns are counted alike, and over the axes in the same order."""
    kinds, offsets = _kinds(plan), np.indices(plan.geometry.bias_shape).reshape(plan.geometry.rank, -1)
    places, filled = _places(plan, "rows", kinds[:, :, None], np.arange(slots))
    entry, row = np.zeros((kinds.shape[1], offsets.shape[1]), dtype=np.int64), np.zeros(filled.shape, dtype=np.int64)
    # Columns from one index on an axis to the next. In a transposed plan later columns have lower indices.
    stride = np.full((kinds.shape[1], 1), -1 if plan.transposed else 1)
    for axis, kind, place, offset in reversed([*zip(plan.axes, kinds, places, offsets, strict=True)]):
        entry += offset * stride
        first_code = axis.col_code[axis.columns.cumsum() - axis.columns]
        row -= (axis.row_code + first_code.repeat(axis.rows))[place] * stride
        stride = stride * axis.columns[kind][:, None]
    return entry.astype(np.int32), row.astype(np.int32)


def _kinds(plan: Plan) -> IntArray:
    """`[rank, classes]`: the number of each class among those of each axis."""
    return np.indices([len(axis.rows) for axis in plan.axes]).reshape(len(plan.axes), -1)


def _places(plan: Plan, of: str, kinds: IntArray, number: IntArray) -> tuple[list[IntArray], NDArray[np.bool_]]:
    """Takes row-major numbers of a class's rows, columns or tiles apart: where each axis has them among all of its.

    And whether the class has so many at all.
    """
    places = []
    for axis, kind in zip(plan.axes[::-1], kinds[::-1], strict=True):
        sizes = getattr(axis, of)
        number, place = np.divmod(number, sizes[kind])
        places.append((sizes.cumsum() - sizes)[kind] + place)
    return places[::-1], number == 0


def _upload(arrays: list[IntArray], dtype: type, device: torch.device) -> list[Tensor]:
    """The arrays on the device, as parts of one tensor."""
    starts = list(accumulate((-(-a.size // ALIGNMENT) * ALIGNMENT for a in arrays), initial=0))
    together: IntArray = np.zeros(starts[-1], dtype=dtype)
    for start, array in zip(starts, arrays, strict=False):
        together[start : start + array.size] = array.ravel()  # words may wrap around: only their bits count
    placed = torch.as_tensor(together, device=device)
    return [placed[start : start + a.size].view(a.shape) for start, a in zip(starts, arrays, strict=False)]
