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
from dinat_triton.plan import AxisTiles, Plan

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
        rows: `[classes, 5, ROWS]`: offset or EMPTY, bias code, word, first column and their number on the long axis.
        columns: `[classes, 4, max_chunks * CHUNK]`: offset or EMPTY, bias code, word, and place on the long axis. Their
            dtype is that of all token addresses.
        bases: `[tiles, 2]`: tokens from which offsets of rows and columns count, the tiles of a class in a row.
        runs: `[runs, 4]`: class, first tile, end, chunks. A program walks one run.
        first_run: `[classes + 1]`: where each class's runs begin.
        has_long_axis: Whether there is an axis that words leave out.
        distinct: `[classes]`: the number of each among the classes of all sizes.
    """

    plan: Plan | MapPlans
    distinct: IntArray
    max_chunks: int
    has_long_axis: bool
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


def _lay_out(plan: Plan | MapPlans, tiles_per_run: int, wide: bool, device: torch.device) -> Layout:
    """Lays a plan out.

    Args:
        plan: With `block` and `chunk` as the kernel takes them.
        tiles_per_run: Tiles that a program walks, at most.
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
    arrays = (rows[distinct], columns[distinct], bases[order], runs, first_run)
    return Layout(plan, distinct, max_chunks, None in shifts, *_upload(arrays, np.int64 if wide else np.int32, device))


# Passes of one call share layouts, and so do batches of many sizes.
layout_of = Kept(_lay_out, lambda layout: layout.rows.untyped_storage().nbytes(), most=128, most_bytes=16 << 20)


def _sizes(plan: Plan | MapPlans) -> tuple[SizePlan, ...]:
    return (alone(plan) if isinstance(plan, Plan) else plan).sizes


def _distinct(rows: IntArray, columns: IntArray) -> tuple[IntArray, IntArray]:
    """The first of every kind of class, and the place of each class's kind among them."""
    kinds: dict[bytes, int] = {}
    alike = [kinds.setdefault(r.tobytes() + c.tobytes(), len(kinds)) for r, c in zip(rows, columns, strict=True)]
    return np.unique(alike, return_index=True)[1], np.array(alike)


def _windows(axis: tuple[AxisTiles, ...]) -> IntArray:
    """The number of each row's window on an axis, counted over the different windows of its class."""
    first, last = _joined(axis, "first"), _joined(axis, "last")
    number = np.zeros(len(first), dtype=np.int64)
    number[1:] = ((first[1:] != first[:-1]) | (last[1:] != last[:-1])).cumsum()
    rows = np.array([tiles.rows for tiles in axis])
    return number - number[rows.cumsum() - rows].repeat(rows)


def _windows_without(axis: tuple[AxisTiles, ...], windows: IntArray) -> IntArray:
    """Bits of the windows that each column of an axis is not in: all before some, and all from some on."""
    rows = np.array([tiles.rows for tiles in axis])
    row_class, _ = counted(rows)
    column_class, column = counted(np.array([tiles.columns for tiles in axis]))
    apart, ends = column.max() + 1, rows.cumsum()
    count = windows[ends - 1][column_class] + 1
    above, here = row_class * apart, column + column_class * apart

    def bit(row: IntArray) -> IntArray:
        return 1 << np.where(row == ends[column_class], count, windows.take(row, mode="clip"))

    # Both ends of windows rise from row to row.
    first_seen = bit(np.searchsorted(_joined(axis, "last") + above, here))
    first_behind = bit(np.searchsorted(_joined(axis, "first") + above, here, "right"))
    return (1 << count) - 1 - (first_behind - first_seen)


def _shifts(windows: list[list[IntArray]]) -> list[int | None]:
    """The first bit of each axis in a word, behind one for columns and one for rows; None for a long axis."""
    counts = [max(int(window.max()) + 1 for window in axis) for axis in zip(*windows, strict=True)]
    long = counts.index(max(counts)) if 2 + sum(counts) > WORD_BITS else None
    starts = accumulate((0 if axis == long else n for axis, n in enumerate(counts)), initial=2)
    return [None if axis == long else start for axis, start in zip(range(len(counts)), starts, strict=False)]


def _rows(size: SizePlan, slots: int, windows: list[IntArray], shifts: list[int | None]) -> IntArray:
    plan = size.plan
    places, filled = _places(plan, "rows", _kinds(plan)[:, :, None], np.arange(slots))
    rows = np.zeros((5, *filled.shape), dtype=np.int64)
    steps = [d * stride for d, stride in zip(plan.geometry.dilation, size.token_strides, strict=True)]
    strides = steps, row_major_strides(plan.geometry.bias_shape)
    for axis, place, step, bias_stride, window, shift in zip(plan.axes, places, *strides, windows, shifts, strict=True):
        number = np.concatenate([np.arange(tiles.rows) for tiles in axis])
        code, first, last = (_joined(axis, name) for name in ("row_code", "first", "last"))
        none = np.zeros_like(number)
        sight = (none, first, last - first + 1) if shift is None else (1 << shift + window, none, none)
        rows += np.stack((number * step, code * bias_stride, *sight)).take(place, axis=1)
    rows[2] += ROW_BIT
    return _padded(rows, filled, (EMPTY, 0, -1, 0, 0))


def _columns(size: SizePlan, slots: int, windows: list[IntArray], shifts: list[int | None]) -> IntArray:
    plan = size.plan
    places, filled = _places(plan, "columns", _kinds(plan)[:, :, None], np.arange(slots))
    columns = np.zeros((4, *filled.shape), dtype=np.int64)
    strides = size.token_strides, row_major_strides(plan.geometry.bias_shape)
    for axis, place, stride, bias_stride, window, shift in zip(
        plan.axes, places, *strides, windows, shifts, strict=True
    ):
        number = np.concatenate([np.arange(tiles.columns) for tiles in axis])
        offset, code = (_joined(axis, name) for name in ("col_offset", "col_code"))
        none = np.zeros_like(number)
        unseen = none if shift is None else _windows_without(axis, window) << shift
        sight = unseen, number if shift is None else none
        columns += np.stack((offset * stride, code * bias_stride, *sight)).take(place, axis=1)
    columns[2] += COLUMN_BIT
    return _padded(columns, filled, (EMPTY, 0, -1, 0))


def _padded(fields: IntArray, filled: NDArray[np.bool_], empty: tuple[int, ...]) -> IntArray:
    """`[classes, fields, slots]` from fields of slots, with `empty` in slots that a class does not have."""
    return np.where(filled, fields, np.array(empty)[:, None, None]).swapaxes(0, 1)


def _bases(sizes: tuple[SizePlan, ...]) -> tuple[IntArray, IntArray]:
    """The class of every tile of every map, counted over the classes of all sizes, and its bases, `[tiles, 2]`."""
    owners, bases, classes = [], [], 0
    for size in sizes:
        plan, maps = size.plan, np.array(size.first_tokens)
        owner, number = counted(plan.shapes[:, 0])
        places, _ = _places(plan, "tiles", _kinds(plan)[:, owner], number)
        own = np.zeros((2, len(owner)), dtype=np.int64)
        for axis, place, stride in zip(plan.axes, places, size.token_strides, strict=True):
            own += np.stack((_joined(axis, "row_start"), _joined(axis, "col_start"))).take(place, axis=1) * stride
        owners.append(np.tile(owner + classes, len(maps)))
        bases.append((own.T + maps[:, None, None]).reshape(-1, 2))
        classes += len(plan.shapes)
    return np.concatenate(owners), np.concatenate(bases)


def _runs(tiles: IntArray, chunks: IntArray, tiles_per_run: int) -> tuple[IntArray, IntArray]:
    """Runs of at most so many tiles of one class, and where the runs of each class begin."""
    count = -(-tiles // tiles_per_run)
    owner, number = counted(count)
    end = np.cumsum(tiles)[owner]
    first = end - tiles[owner] + number * tiles_per_run
    runs = np.stack((owner, first, np.minimum(first + tiles_per_run, end), chunks[owner]), 1)
    return runs, np.append(0, np.cumsum(count))


def _entries(plan: Plan, slots: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """On each axis a row's bias indices and its columns are counted alike, and over the axes in the same order."""
    kinds, offsets = _kinds(plan), np.indices(plan.geometry.bias_shape).reshape(plan.geometry.rank, -1)
    places, filled = _places(plan, "rows", kinds[:, :, None], np.arange(slots))
    entry, row = np.zeros((kinds.shape[1], offsets.shape[1]), dtype=np.int64), np.zeros(filled.shape, dtype=np.int64)
    # Columns from one index on an axis to the next. In a transposed plan later columns have lower indices.
    stride = np.full((kinds.shape[1], 1), -1 if plan.transposed else 1)
    for axis, kind, place, offset in reversed([*zip(plan.axes, kinds, places, offsets, strict=True)]):
        entry += offset * stride
        row -= np.concatenate([tiles.row_code + tiles.col_code[0] for tiles in axis])[place] * stride
        stride = stride * np.array([tiles.columns for tiles in axis])[kind][:, None]
    return entry.astype(np.int32), row.astype(np.int32)


def _kinds(plan: Plan) -> IntArray:
    """`[rank, classes]`: the number of each class among those of each axis."""
    return np.indices([len(axis) for axis in plan.axes]).reshape(len(plan.axes), -1)


def _joined(axis: tuple[AxisTiles, ...], name: str) -> IntArray:
    """A vector of all classes of an axis, one after the other."""
    return np.concatenate([getattr(tiles, name) for tiles in axis])


def _places(plan: Plan, of: str, kinds: IntArray, number: IntArray) -> tuple[list[IntArray], NDArray[np.bool_]]:
    """Takes row-major numbers of a class's rows, columns or tiles apart: where each axis has them among its `_joined`.

    And whether the class has so many at all.
    """
    places = []
    for axis, kind in zip(plan.axes[::-1], kinds[::-1], strict=True):
        sizes = np.array([getattr(tiles, of) for tiles in axis])
        number, place = np.divmod(number, sizes[kind])
        places.append((np.cumsum(sizes) - sizes)[kind] + place)
    return places[::-1], number == 0


def _upload(arrays: tuple[IntArray, ...], dtype: type, device: torch.device) -> list[Tensor]:
    """The arrays on the device, as parts of one tensor."""
    starts = list(accumulate((-(-a.size // ALIGNMENT) * ALIGNMENT for a in arrays), initial=0))
    together: IntArray = np.zeros(starts[-1], dtype=dtype)
    for start, array in zip(starts, arrays, strict=False):
        together[start : start + array.size] = array.ravel()  # words may wrap around: only their bits count
    placed = torch.as_tensor(together, device=device)
    return [placed[start : start + a.size].view(a.shape) for start, a in zip(starts, arrays, strict=False)]
