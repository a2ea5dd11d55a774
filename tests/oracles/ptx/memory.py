"""The memories of a GPU, and what runs beside its threads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

# As a number of any type: not one, or a large one.
UNWRITTEN = 0xFF


class Fault(Exception):
    """What a GPU would crash on, or do differently from run to run."""


class Memory:
    """Bytes, read and written as numbers of one type, at multiples of their size; `who` is a warp or a program."""

    def __init__(self, content: Array):
        self.bytes = content

    def numbers(self, kind: str) -> Array:
        return self.bytes[: len(self.bytes) - len(self.bytes) % np.dtype(kind).itemsize].view(kind)

    def load(self, place: Array, kind: str, who: Array) -> Array:
        return self.numbers(kind)[place]

    def store(self, place: Array, kind: str, who: Array, values: Array) -> None:
        self.numbers(kind)[place] = values


class Global(Memory):
    """A tensor's memory, and which program wrote what in it."""

    def __init__(self, tensor: Tensor):
        storage = tensor.untyped_storage()
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        super().__init__(np.frombuffer((ctypes.c_uint8 * self.size).from_address(self.start), "u1"))
        self.writers = np.full(self.size, -1)

    def store(self, place: Array, kind: str, who: Array, values: Array) -> None:
        first = place * np.dtype(kind).itemsize
        before = self.writers[first]
        self.writers[first] = who
        if ((before != -1) & (before != who)).any() or (self.writers[first] != who).any():
            raise Fault("two programs write one place")
        super().store(place, kind, who, values)


class Shared(Memory):
    """The shared memory of some programs, and which warps read and wrote each byte since the last barrier, as bits."""

    def __init__(self, programs: int, size: int):
        self.size = -(-max(size, 1) // 16) * 16
        super().__init__(np.full(programs * self.size, UNWRITTEN, "u1"))
        self.readers, self.writers = np.zeros_like(self.bytes), np.zeros_like(self.bytes)
        self.unfenced, self.in_use = np.zeros_like(self.bytes), np.zeros_like(self.bytes)

    def load(self, place: Array, kind: str, who: Array) -> Array:
        for warp in np.unique(who):
            at = place[who == warp]
            self._meet(at, kind, warp, self.writers)
            self._note(at, kind, warp, self.readers)
        return super().load(place, kind, who)

    def store(self, place: Array, kind: str, who: Array, values: Array) -> None:
        """Writing what is there already, as warps with the same work do, is no conflict."""
        if self.in_use.view(f"u{np.dtype(kind).itemsize}")[place].any():
            raise Fault("a store where matrix units still read")
        for warp in np.unique(who):
            at, new = place[who == warp], values[who == warp]
            changed = at[super().load(at, kind, who) != new]
            self._meet(changed, kind, warp, self.writers, self.readers)
            self._note(changed, kind, warp, self.writers)
            self._note(at, kind, warp, self.unfenced)
            super().store(at, kind, who, new)

    def use(self, place: Array, kind: str, warp: int) -> Array:
        """What one warp has matrix units read; when they are done with it is not a matter of barriers."""
        self._meet(place, kind, warp, self.writers)
        return super().load(place, kind, place)

    def pass_barrier(self, programs: Array) -> None:
        for notes in (self.readers, self.writers):
            notes.reshape(-1, self.size)[programs] = 0

    def pass_fence(self, programs: Array) -> None:
        self.unfenced.reshape(-1, self.size)[programs] = 0

    def _meet(self, place: Array, kind: str, warp: int, *notes: Array) -> None:
        mine = self._bits(kind, warp)
        if any((x.view(mine.dtype)[place] & ~mine).any() for x in notes):
            raise Fault("warps meet in shared memory without a barrier")

    def _note(self, place: Array, kind: str, warp: int, notes: Array) -> None:
        mine = self._bits(kind, warp)
        notes.view(mine.dtype)[place] |= mine

    def _bits(self, kind: str, warp: int) -> Any:
        """The warp's bit in each byte of a number."""
        size = np.dtype(kind).itemsize
        return np.full(size, 1 << warp % 8, "u1").view(f"u{size}")[0]


class TensorMemory:
    """The memory of Blackwell's matrix units, `[programs, lanes, columns]`, and what of it a product uses."""

    def __init__(self, programs: int):
        self.shape = (programs, 128, 512)
        self.allocated = np.zeros(programs, int)

    @cached_property
    def words(self) -> Array:
        return np.full((*self.shape[:2], 4 * self.shape[2]), UNWRITTEN, "u1").view("u4")

    @cached_property
    def in_use(self) -> Array:
        return np.zeros(self.shape, "u1")


class Groups:
    """Work that runs beside its owners, threads or programs, until they wait for the group that it belongs to."""

    def __init__(self, owners: int):
        self.committed = np.zeros(owners, int)
        self.running: list[tuple[Array, Array, tuple[Array, ...]]] = []

    def begin(self, owners: Array, *work: Array) -> None:
        self.running.append((owners, self.committed[owners], work))

    def commit(self, owners: Array) -> None:
        self.committed[owners] += 1

    def wait(self, owners: Array, groups: Array) -> Iterator[tuple[Array, ...]]:
        """The work in so many first groups of these owners, each piece with its owner."""
        until = np.zeros_like(self.committed)
        until[owners] = groups
        running, self.running = self.running, []
        for owner, group, work in running:
            done = group < until[owner]
            if done.any():
                yield owner[done], *(x[done] for x in work)
            if not done.all():
                self.running.append((owner[~done], group[~done], tuple(x[~done] for x in work)))
