"""Share of each rank of one sharded axis: what it computes, and the positions that it has to read for that.

A rank's share is a small axis of its own, so that any backend can attend on it: its windows are those of the whole axis
for every query that counts. The tokens of a share are a comb of the axis, runs of neighboring residue classes taken
every `dilation` positions. Two combs serve:

* "halo": the rank's own queries, and around them everything that their windows reach;
* "classes": whole residue classes, all of their queries. Residue classes never mix, so they need no halo.

A share may hold tokens that no window reaches; their keys are zeros. Outputs of queries that do not count are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from dinat_triton.geometry import SHIFT, WRAP, Axis, IntArray

WHOLE, HALO, CLASSES = "whole", "halo", "classes"
# What a split may cost: tokens of its shares together, in tokens of the one that it replaces.
MOST_WORK_OF_A_SPLIT = 1.25


@dataclass(frozen=True, eq=False)
class Share:
    """A rank's part of an axis.

    Attributes:
        axis: The small axis. A rank with nothing to do has one of a window, so that it does as all others do.
        positions: `[axis.size]`: where its tokens lie on the whole axis.
        queries: Tokens whose outputs count, as a range.
        needed: Positions whose keys are read, ascending.
        slots: Tokens whose keys are read.
        sources: The place in `needed` of each of them. An axis that wraps around can show a position twice.
    """

    axis: Axis
    positions: IntArray
    queries: range
    needed: IntArray
    slots: IntArray
    sources: IntArray

    @property
    def owned(self) -> IntArray:
        """Positions of the queries that count."""
        return self.positions[self.queries.start : self.queries.stop]

    @cached_property
    def reads_all(self) -> bool:
        """Whether the keys that are read are the small axis' tokens, one by one."""
        every = np.arange(self.axis.size)
        return np.array_equal(self.slots, every) and np.array_equal(self.sources, every)


def chunks(size: int, ranks: int) -> list[IntArray]:
    """Positions that each rank owns, as DTensor cuts an axis: equal parts, but for the last ones."""
    part = -(-size // ranks)
    return [np.arange(min(rank * part, size), min((rank + 1) * part, size)) for rank in range(ranks)]


@lru_cache(maxsize=512)
def shares(axis: Axis, ranks: int, scheme: str) -> tuple[Share, ...]:
    """The shares of all ranks."""
    if scheme == CLASSES:
        dealt = np.array_split(np.arange(axis.dilation), ranks)
        return tuple(class_share(axis, residues) for residues in dealt)
    return tuple(halo_share(axis, own) for own in chunks(axis.size, ranks))


def class_share(axis: Axis, residues: IntArray) -> Share:
    """The share of a rank that computes some neighboring residue classes."""
    if len(residues) == 0:
        return idle_share(axis)
    positions = np.flatnonzero(np.isin(np.arange(axis.size) % axis.dilation, residues))
    small = replace(axis, size=len(positions), dilation=len(residues))
    every = np.arange(len(positions))
    return Share(small, positions, range(len(positions)), positions, every, every)


def halo_share(axis: Axis, own: IntArray) -> Share:
    """The share of a rank that computes a run of queries."""
    if len(own) == 0:
        return idle_share(axis)
    reached, last_leader = _reach(axis, own)
    start, run = int(own[0]), min(len(own), axis.dilation)
    if axis.stride > 1 and start % axis.dilation + run > axis.dilation:
        run = axis.dilation
    if axis.stride > 1 and run == axis.dilation:
        start -= start % axis.dilation  # all residue classes of the comb begin at one class index
    comb = _Comb(axis, start, run)
    first, stop = int(comb.slot(reached[0])), int(comb.slot(np.maximum(last_leader, reached[-1])).max()) + 1
    first, stop = comb.widened(first, stop)
    positions = comb.position(np.arange(first, stop)) % axis.size
    query = int(comb.slot(own[0])) - first
    # Windows that wrap around do not pass an end of the small axis, nor do others that are not cut or shifted.
    small = replace(axis, size=stop - first, dilation=run, border=SHIFT if axis.border == WRAP else axis.border)
    needed, sources = np.unique(reached % axis.size, return_inverse=True)
    return Share(small, positions, range(query, query + len(own)), needed, comb.slot(reached) - first, sources)


def split_share(axis: Axis, own: IntArray) -> tuple[Share | None, ...] | None:
    """Shares of the queries before, among and after those of a run that see none but the run's own keys.

    None if that adds too much work, or if no query sees another key. At an end of the map, only one side may.
    """
    if len(own) == 0:
        return None
    _, residue, start, end = _windows(axis, own)
    inside = (start * axis.dilation + residue >= own[0]) & ((end - 1) * axis.dilation + residue <= own[-1])
    edges = np.concatenate(([-1], np.flatnonzero(~inside), [len(own)]))
    longest = int(np.diff(edges).argmax())
    runs = np.split(own, [edges[longest] + 1, edges[longest + 1]])
    if len(runs[1]) in (0, len(own)):
        return None
    split = tuple(halo_share(axis, run) if len(run) else None for run in runs)
    work = sum(share.axis.size for share in split if share is not None)
    return split if work <= MOST_WORK_OF_A_SPLIT * halo_share(axis, own).axis.size else None


def idle_share(axis: Axis) -> Share:
    """The share of a rank without queries."""
    nothing = np.arange(0)
    small = replace(axis, size=axis.kernel, dilation=1)
    return Share(small, np.arange(axis.kernel), range(0), nothing, nothing, nothing)


def _reach(axis: Axis, queries: IntArray) -> tuple[IntArray, IntArray]:
    """Positions that some queries see, ascending, and that of the last query of each one's stride group.

    On an axis that wraps around, positions go on beyond both ends.
    """
    index, residue, start, end = _windows(axis, queries)
    seen = np.zeros(3 * axis.size, dtype=bool)  # this round of the axis and its neighbors
    for step in range(int((end - start).max())):
        member = start + step
        seen[(member * axis.dilation + residue)[member < end] + axis.size] = True
    group_end = index // axis.stride * axis.stride + axis.stride - 1
    if axis.border != WRAP:
        group_end = np.minimum(group_end, _class_length(axis, residue) - 1)
    return np.flatnonzero(seen) - axis.size, group_end * axis.dilation + residue


def _windows(axis: Axis, queries: IntArray) -> tuple[IntArray, ...]:
    """Class index and residue of some queries, and the half-open interval of class indices that each sees."""
    index, residue = np.divmod(queries, axis.dilation)
    length = _class_length(axis, residue)
    start, end = np.empty_like(index), np.empty_like(index)
    for n in np.unique(length):
        windows = axis.windows(int(n))
        of_length = length == n
        start[of_length], end[of_length] = (bound[index[of_length]] for bound in windows)
    return index, residue, start, end


def _class_length(axis: Axis, residue: IntArray) -> IntArray:
    return -((residue - axis.size) // axis.dilation)


@dataclass(frozen=True)
class _Comb:
    """Runs of `run` positions of an axis, one every `dilation`; `start` begins one. Slots number them from there."""

    axis: Axis
    start: int
    run: int

    def position(self, slot: IntArray) -> IntArray:
        row, offset = np.divmod(slot, self.run)
        return self.start + row * self.axis.dilation + offset

    def slot(self, position: IntArray) -> IntArray:
        row, offset = np.divmod(position - self.start, self.axis.dilation)
        return row * self.run + offset

    @property
    def ends(self) -> tuple[int, int]:
        """Slots of the whole axis, and of all its rounds if it wraps around."""
        if self.axis.border == WRAP:
            return -(1 << 62), 1 << 62
        rows = self.axis.size // self.axis.dilation + 1
        slots = np.arange(-rows * self.run, rows * self.run)
        inside = slots[(self.position(slots) >= 0) & (self.position(slots) < self.axis.size)]
        return int(inside[0]), int(inside[-1]) + 1

    def widened(self, first: int, stop: int) -> tuple[int, int]:
        """Slots from the beginning of a stride group, and enough of them for a window."""
        least, most = self.ends
        stop = min(max(stop, first + self.axis.kernel * self.run), most)
        first = max(min(first, stop - self.axis.kernel * self.run), least)
        if self.axis.stride > 1:
            row = first // self.run
            row -= (row + self.start // self.axis.dilation) % self.axis.stride
            first = max(row * self.run, least)
        return first, stop
