"""A plan as the kernels read it: vectors per tile class, two bases per tile, and runs of tiles, on the device.

A class is a product of one class per axis. All arrays are worked out for all classes at once: slot `s` of a class is
taken apart into one index per axis, and what the axes hold there is added up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinat_triton.geometry import IntArray, row_major_strides
from dinat_triton.plan import MASKED, AxisTiles, Plan

EMPTY = -(2**31)  # the offset of a slot without a token: negative from every base
# Arrays begin at multiples of so many numbers, so that kernels can read them 16 bytes at a time.
ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class Layout:
    """Index arrays of a plan.

    Columns are compared with the first and the last that a row sees on all axes at once. A word holds one field per
    axis, each below a guard bit. With G all guards, a column's word is its place + G, a row's are first and last + 2 G:
    differences of a column and both keep all guards exactly if the row sees the column.

    Attributes:
        rows: `[classes, 4, ROWS]`: offset or EMPTY, bias code, and the words of the first and last column seen.
        columns: `[classes, 3, max_chunks * CHUNK]`: offset or EMPTY, bias code, and the word of the place. Their dtype
            is that of all token addresses.
        bases: `[tiles, 2]`: tokens from which offsets of rows and columns count, the tiles of a class in a row.
        runs: `[runs, 4]`: class, first tile, end, chunks. A program walks one run.
        first_run: `[classes + 1]`: where each class's runs begin.
        guards: Of the words.
    """

    plan: Plan
    max_chunks: int
    guards: int
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
    def members(self) -> Tensor:
        """`[offsets, slots]`: the pairs of all classes that each bias entry is added to, padded with -1."""
        members = _members(_Classes(self.plan), self.row_slots, self.columns.shape[2])
        return torch.as_tensor(members, device=self.rows.device)


@lru_cache(maxsize=256)
def layout_of(plan: Plan, tiles_per_run: int, wide: bool, device: torch.device) -> Layout:
    """Lays a plan out.

    Args:
        plan: With `block` and `chunk` as the kernel takes them.
        tiles_per_run: Tiles that a program walks, at most.
        wide: Whether token addresses within a batch item need 64 bits.
        device: Where to.
    """
    classes = _Classes(plan)
    tiles, rows, columns = plan.shapes.T
    chunks = -(-columns // plan.chunk)
    max_chunks = int(chunks.max())
    bits = [max(tiles.columns for tiles in axis).bit_length() for axis in plan.axes]
    *shifts, end = accumulate((n + 1 for n in bits), initial=0)
    guards = sum(1 << (shift + n) for shift, n in zip(shifts, bits, strict=True))
    runs, first_run = _runs(tiles, chunks, tiles_per_run)
    arrays = (
        _rows(classes, plan.block or int(rows.max()), shifts, guards),
        _columns(classes, max_chunks * plan.chunk, shifts, guards),
        _bases(classes, tiles),
        runs,
        first_run,
    )
    return Layout(plan, max_chunks, guards, *_upload(arrays, np.int64 if wide or end > 31 else np.int32, device))


class _Classes:
    """A plan's classes as numbers of the classes on each axis."""

    def __init__(self, plan: Plan):
        self.axes, geometry = plan.axes, plan.geometry
        self.kinds = np.indices([len(axis) for axis in plan.axes]).reshape(geometry.rank, -1)
        self.steps = [d * stride for d, stride in zip(geometry.dilation, geometry.token_strides, strict=True)]
        self.token_strides, self.bias_shape = geometry.token_strides, geometry.bias_shape

    def sizes(self, of: str) -> IntArray:
        """`[rank, classes]`: how many rows, columns or tiles the classes have along each axis."""
        counts = ([getattr(tiles, of) for tiles in axis] for axis in self.axes)
        return np.stack([np.array(n)[kind] for n, kind in zip(counts, self.kinds, strict=True)])

    def table(self, of: str, slots: int, per_axis: list[IntArray], empty: list[int]) -> IntArray:
        """`[classes, fields, slots]`: sums of what the axes hold, `[fields, kinds, places]` each, or `empty`."""
        places, filled = unravel(np.arange(slots), self.sizes(of)[:, :, None])
        fields = sum(axis[:, k[:, None], p] for axis, k, p in zip(per_axis, self.kinds, places, strict=True))
        return np.where(filled, fields, np.array(empty)[:, None, None]).swapaxes(0, 1)


def unravel(index: IntArray, sizes: IntArray) -> tuple[list[IntArray], NDArray[np.bool_]]:
    """Takes row-major indices apart, one part per axis; `sizes` begins with the axes. And whether they are in range."""
    parts = []
    for size in sizes[::-1]:
        index, part = np.divmod(index, size)
        parts.append(part)
    return parts[::-1], index == 0


def _rows(classes: _Classes, slots: int, shifts: list[int], guards: int) -> IntArray:
    per_axis = []
    strides = zip(classes.axes, classes.steps, row_major_strides(classes.bias_shape), shifts, strict=True)
    for axis, step, bias_stride, shift in strides:
        first, last = _padded(axis, "first") << shift, _padded(axis, "last") << shift
        offset = np.broadcast_to(np.arange(first.shape[1]) * step, first.shape)
        per_axis.append(np.stack((offset, _padded(axis, "row_code") * bias_stride, first, last)))
    per_axis[0][3] += 2 * guards
    return classes.table("rows", slots, per_axis, [EMPTY, 0, guards - 1, 2 * guards])


def _columns(classes: _Classes, slots: int, shifts: list[int], guards: int) -> IntArray:
    per_axis = []
    strides = zip(classes.axes, classes.steps, row_major_strides(classes.bias_shape), shifts, strict=True)
    for axis, step, bias_stride, shift in strides:
        code = _padded(axis, "col_code") * bias_stride
        place = np.broadcast_to(np.arange(code.shape[1]), code.shape)
        per_axis.append(np.stack((place * step, code, place << shift)))
    per_axis[0][2] += guards
    # No row sees a place with all bits set: the last column of a row lies below.
    return classes.table("columns", slots, per_axis, [EMPTY, 0, guards | (guards - 1)])


def _padded(axis: tuple[AxisTiles, ...], name: str) -> IntArray:
    """A vector of each class on an axis, as one array."""
    vectors = [getattr(tiles, name) for tiles in axis]
    together = np.zeros((len(vectors), max(map(len, vectors))), dtype=np.int64)
    for row, vector in zip(together, vectors, strict=True):
        row[: len(vector)] = vector
    return together


def _bases(classes: _Classes, tiles: IntArray) -> IntArray:
    owner = np.repeat(np.arange(len(tiles)), tiles)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    places, _ = unravel(number, classes.sizes("tiles")[:, owner])
    bases = np.zeros((len(owner), 2), dtype=np.int64)
    for axis, kind, place, stride in zip(classes.axes, classes.kinds, places, classes.token_strides, strict=True):
        starts = np.concatenate([np.stack((tiles.row_start, tiles.col_start), 1) for tiles in axis])
        before = np.cumsum([0] + [tiles.tiles for tiles in axis])
        bases += starts[before[kind[owner]] + place] * stride
    return bases


def _runs(tiles: IntArray, chunks: IntArray, tiles_per_run: int) -> tuple[IntArray, IntArray]:
    """Runs of at most so many tiles of one class, and where the runs of each class begin."""
    count = -(-tiles // tiles_per_run)
    first_run = np.append(0, np.cumsum(count))
    owner = np.repeat(np.arange(len(tiles)), count)
    end = np.cumsum(tiles)
    first = (end - tiles)[owner] + (np.arange(len(owner)) - first_run[owner]) * tiles_per_run
    return np.stack((owner, first, np.minimum(first + tiles_per_run, end[owner]), chunks[owner]), 1), first_run


def _members(classes: _Classes, row_slots: int, span: int) -> NDArray[np.int32]:
    """Each row of a class has a bias entry with one column at most."""
    offsets, _ = unravel(np.arange(np.prod(classes.bias_shape)), np.array(classes.bias_shape)[:, None])
    rows, filled = unravel(np.arange(row_slots), classes.sizes("rows")[:, :, None])
    sizes = classes.sizes("columns")
    column, seen = np.zeros(1, dtype=np.int64), filled
    for a, axis in enumerate(classes.axes):
        of_axis = np.full((len(axis), classes.bias_shape[a], max(tiles.rows for tiles in axis)), MASKED)
        for number, tiles in enumerate(axis):
            of_axis[number, :, : tiles.rows] = tiles.column_of(classes.bias_shape[a])
        own = of_axis[classes.kinds[a][:, None], offsets[a][:, None, None], rows[a]]  # [offsets, classes, rows]
        column, seen = column * sizes[a][:, None] + own, seen & (own != MASKED)
    pair = np.arange(len(filled) * row_slots).reshape(filled.shape) * span + column
    return np.where(seen, pair, -1).reshape(len(pair), -1).astype(np.int32)


def _upload(arrays: tuple[IntArray, ...], dtype: type, device: torch.device) -> list[Tensor]:
    """The arrays on the device, as parts of one tensor."""
    starts = list(accumulate((-(-a.size // ALIGNMENT) * ALIGNMENT for a in arrays), initial=0))
    together: IntArray = np.zeros(starts[-1], dtype=dtype)
    for start, array in zip(starts, arrays, strict=False):
        together[start : start + array.size] = array.ravel()  # words may wrap around: only their bits count
    placed = torch.as_tensor(together, device=device)
    return [placed[start : start + a.size].view(a.shape) for start, a in zip(starts, arrays, strict=False)]
