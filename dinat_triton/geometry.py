"""Geometry of neighborhoods: the keys that a query sees, and the queries that see a key.

This is the only module that knows windows, borders, dilation, stride and causality. Everything is decided per axis; in
N dimensions a neighborhood is the Cartesian product of the axes' windows.

Dilation splits an axis into residue classes (`position % dilation`) that never mix. Inside a class, tokens are counted
by their class index (`position // dilation`), and windows are intervals of class indices. On an axis that wraps around
these count on beyond both ends, where they name the same tokens again; its classes are all of one length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

# What becomes of a window that would pass an end of its axis: it moves inwards, is cut, or goes on at the other end.
BORDERS = SHIFT, CLIP, WRAP = "shift", "clip", "wrap"
# Numbers that a flat window has per axis.
WINDOW_FIELDS = 5


@dataclass(frozen=True)
class Axis:
    """One axis of a geometry."""

    size: int
    kernel: int
    dilation: int
    stride: int
    causal: bool
    border: str = SHIFT

    @property
    def num_offsets(self) -> int:
        """Relative positions a query and a key of one window can have: the length of the bias table on this axis."""
        return 2 * self.kernel - 1

    @property
    def num_pairs(self) -> int:
        """(query, key) pairs along this axis of which one sees the other."""
        windows = [(len(residues), *self.windows(length)) for length, residues in self.residue_classes()]
        return sum(count * int((end - start).sum()) for count, start, end in windows)

    @property
    def margin(self) -> int:
        """Distance from the ends of a residue class at which neither windows nor observers know of them any more."""
        return self.kernel + self.stride

    @property
    def closed_columns(self) -> int:
        """Columns that a tile needs which shares none with another one: a residue class, where windows overlap."""
        longest = -(-self.size // self.dilation)
        return longest if self.stride < self.kernel else min(self.kernel, longest)

    def residue_classes(self) -> Iterator[tuple[int, IntArray]]:
        """Yields (class length, its residues). Lengths differ by one where the dilation does not divide the size."""
        length, longer = divmod(self.size, self.dilation)
        if longer:
            yield length + 1, np.arange(longer)
        if length:
            yield length, np.arange(longer, self.dilation)

    def windows(self, length: int) -> tuple[IntArray, IntArray]:
        """Half-open interval of keys that each query of a residue class sees, in class indices."""
        query = np.arange(length)
        leader = query // self.stride * self.stride + (self.stride - 1 if self.causal else self.stride // 2)
        if self.border == SHIFT:
            leader = np.minimum(leader, length - 1)
        start = leader - (self.kernel - 1 if self.causal else self.kernel // 2)
        if self.border == SHIFT and not self.causal:
            start = np.minimum(np.maximum(start, 0), length - self.kernel)
            return start, start + self.kernel
        end = query + 1 if self.causal else start + self.kernel
        return (start, end) if self.border == WRAP else (np.maximum(start, 0), np.minimum(end, length))

    def observers(self, length: int) -> tuple[IntArray, IntArray]:
        """Half-open interval of queries that see each key of a residue class, in class indices.

        Both ends of a window never move back as the query moves on, so the inverse of an interval map is one too.
        """
        start, end = self.windows(length)
        if self.border == WRAP:  # three rounds of queries, of which the second is this one
            start, end = (np.concatenate((x - length, x, x + length)) for x in (start, end))
        key = np.arange(length)
        first, past = np.searchsorted(end, key, side="right"), np.searchsorted(start, key, side="right")
        return (first - length, past - length) if self.border == WRAP else (first, past)

    def seen_at(self, position: int, inverse: bool = False) -> IntArray:
        """Positions that the query at a position sees, or those of the queries that see the key there."""
        index, residue = divmod(position, self.dilation)
        length = -((residue - self.size) // self.dilation)
        start, end = (self.observers if inverse else self.windows)(length)
        return (np.arange(start[index], end[index]) * self.dilation + residue) % self.size

    def neighbors(self) -> tuple[IntArray, IntArray]:
        """Positions and bias indices of every query's keys, both `[size, kernel]`, -1 where a window is shorter."""
        return self._expand(inverse=False)

    def inverse_neighbors(self) -> tuple[IntArray, IntArray]:
        """Positions and bias indices of the queries that see each key, both `[size, most]`, padded with -1."""
        return self._expand(inverse=True)

    def _expand(self, inverse: bool) -> tuple[IntArray, IntArray]:
        classes = [(*(self.observers if inverse else self.windows)(n), r) for n, r in self.residue_classes()]
        width = max(int((end - start).max()) for start, end, _ in classes)
        positions = np.full((self.size, width), -1)
        offsets = np.full((self.size, width), -1)
        for start, end, residues in classes:
            index = np.arange(len(start))
            member = start[:, None] + np.arange(width)
            seen = member < end[:, None]
            offset = self.offset(member, index[:, None]) if not inverse else self.offset(index[:, None], member)
            for residue in residues:
                own = index * self.dilation + residue
                positions[own] = np.where(seen, (member * self.dilation + residue) % self.size, -1)
                offsets[own] = np.where(seen, offset, -1)
        return positions, offsets

    def offset(self, key: IntArray, query: IntArray) -> IntArray:
        """Index into the bias table of a pair of class indices."""
        return key - query + self.kernel - 1


@dataclass(frozen=True)
class Geometry:
    """A neighborhood attention problem without its tensors: map shape, and the window along each axis.

    Args:
        shape: Tokens along each of one to three axes.
        kernel_size: Keys in a window along each axis.
        dilation: Distance between neighboring keys of a window.
        stride: Queries that share one window. 1 slides it, `kernel_size` gives blocked attention.
        is_causal: Whether a query sees only keys at or before its own position on that axis.
        border: "shift" moves windows that would pass an end inwards, "clip" cuts them, "wrap" has them go on at the
            other end, the keys before a causal query too. A clipped window may be larger than the map; a wrapped axis
            needs a length that is a multiple of its dilation.

    All but `shape` broadcast over the axes.
    """

    shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...] = (1,)
    stride: tuple[int, ...] = (1,)
    is_causal: tuple[bool, ...] = (False,)
    border: tuple[str, ...] = (SHIFT,)

    def __post_init__(self) -> None:
        shape = self.shape if isinstance(self.shape, Sequence) else (self.shape,)
        if not 1 <= len(shape) <= 3:
            raise ValueError(f"shape must have 1, 2 or 3 axes, got {tuple(shape)}")
        rank = len(shape)
        object.__setattr__(self, "shape", broadcast_ints("shape", tuple(shape), rank))
        for name in ("kernel_size", "dilation", "stride"):
            object.__setattr__(self, name, broadcast_ints(name, getattr(self, name), rank))
        object.__setattr__(self, "is_causal", broadcast_bools("is_causal", self.is_causal, rank))
        object.__setattr__(self, "border", broadcast_borders(self.border, rank))
        for axis, (k, s) in enumerate(zip(self.kernel_size, self.stride, strict=True)):
            if s > k:
                raise ValueError(f"stride must not exceed kernel_size {k}, got {s} on axis {axis}")
        check_fits(self.shape, self.kernel_size, self.dilation, self.border)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        fields = (self.shape, self.kernel_size, self.dilation, self.stride, self.is_causal, self.border)
        return tuple(Axis(*values) for values in zip(*fields, strict=True))

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def num_tokens(self) -> int:
        return prod(self.shape)

    @cached_property
    def token_strides(self) -> tuple[int, ...]:
        """Tokens from one position of an axis to the next."""
        return row_major_strides(self.shape)

    @cached_property
    def bias_shape(self) -> tuple[int, ...]:
        """Shape of one head's relative positional bias."""
        return tuple(axis.num_offsets for axis in self.axes)

    @cached_property
    def num_offsets(self) -> int:
        return prod(self.bias_shape)

    @cached_property
    def num_pairs(self) -> int:
        """(query, key) pairs that attend: the scores any implementation has to evaluate, per head."""
        return prod(axis.num_pairs for axis in self.axes)

    def neighbors(self) -> tuple[IntArray, IntArray]:
        """Tokens and bias indices of the keys of every query.

        Both are `[tokens, prod(kernel_size)]`, the window in row-major order; -1 where a window is shorter.
        Tokens are counted in row-major order over the map, bias indices in row-major order over `bias_shape`.
        """
        return self._product([axis.neighbors() for axis in self.axes])

    def inverse_neighbors(self) -> tuple[IntArray, IntArray]:
        """Tokens and bias indices of the queries that see each key, `[tokens, most]`, padded with -1."""
        return self._product([axis.inverse_neighbors() for axis in self.axes])

    def token_at(self, position: Sequence[int]) -> int:
        """The token at a position of the map."""
        position = tuple(position)
        if len(position) != self.rank or not all(0 <= p < n for p, n in zip(position, self.shape, strict=True)):
            raise ValueError(f"the position must lie on the map {self.shape}, got {position}")
        return int(np.ravel_multi_index(position, self.shape))

    def keys_of(self, query: Sequence[int]) -> IntArray:
        """Tokens that the query at a position sees. Needs no table of all windows, however large they are."""
        return self._seen_at(query)

    def queries_of(self, key: Sequence[int]) -> IntArray:
        """Tokens that see the key at a position."""
        return self._seen_at(key, inverse=True)

    def _seen_at(self, position: Sequence[int], inverse: bool = False) -> IntArray:
        self.token_at(position)  # says what is wrong with the position
        seen = [axis.seen_at(p, inverse) for axis, p in zip(self.axes, position, strict=True)]
        return outer_sum(seen, self.token_strides)

    def _product(self, per_axis: list[tuple[IntArray, IntArray]]) -> tuple[IntArray, IntArray]:
        tokens = outer_index([positions for positions, _ in per_axis], self.shape)
        offsets = outer_index([offsets for _, offsets in per_axis], self.bias_shape)
        return tokens, offsets


def check_fits(
    shape: Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int], border: Sequence[str]
) -> None:
    """Refuses a map that is too small for a window, or of a wrong length. Its lengths may be symbols of a graph."""
    for axis, (n, k, d, b) in enumerate(zip(shape, kernel_size, dilation, border, strict=True)):
        if k * d > n and b != CLIP:
            n = int(n)
            smaller = f"a dilation of at most {n // k}" if k <= n else f"a kernel_size of at most {n}"
            pad = f"pad the input to at least {k * d} (the NeighborhoodAttention modules do), or " if b == SHIFT else ""
            raise ValueError(
                f"kernel_size * dilation must fit the map: {k} * {d} = {k * d} exceeds length {n} of axis {axis}; "
                f"{pad}use {smaller}, or border='clip'"
            )
        if b == WRAP and n % d:
            raise ValueError(
                f"dilation must divide the length of an axis that wraps around, got {d} for length {int(n)} of axis "
                f"{axis}; a length of {int(n) - int(n) % d + d} would do"
            )


def outer_index(per_axis: Sequence[IntArray], shape: Sequence[int]) -> IntArray:
    """Combines one index per axis into row-major indices over `shape`.

    Each `per_axis[a]` is a matrix `[m_a, n_a]`; the result is `[prod(m), prod(n)]`, -1 wherever any factor is negative.
    """
    rank = len(per_axis)
    total = np.zeros((1,) * (2 * rank), dtype=np.int64)
    valid = np.ones_like(total, dtype=bool)
    for axis, index in enumerate(per_axis):
        spread = [1] * (2 * rank)
        spread[axis], spread[rank + axis] = index.shape
        index = index.reshape(spread)
        total = total * shape[axis] + index
        valid = valid & (index >= 0)
    rows = prod(index.shape[0] for index in per_axis)
    return np.where(valid, total, -1).reshape(rows, -1)


def outer_sum(per_axis: Sequence[IntArray], strides: Sequence[int]) -> IntArray:
    """Row-major indices of the Cartesian product of one vector of positions per axis, as a vector."""
    total = np.zeros(1, dtype=np.int64)
    for index, stride in zip(per_axis, strides, strict=True):
        total = (total[:, None] + index * stride).ravel()
    return total


def counted(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Owner of each thing, and its number among the owner's, where each owner has so many."""
    owner = np.arange(len(counts)).repeat(counts)
    return owner, np.arange(len(owner)) - (counts.cumsum() - counts).repeat(counts)


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Entries of a row-major array from one index of an axis to the next."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def broadcast_ints(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """One positive integer per axis."""
    if type(value) is int and value >= 1:
        return (value,) * rank
    if type(value) is tuple and [*map(type, value)] == [int] * rank and min(value) >= 1:
        return value
    values = _broadcast(name, value, rank, "integer")
    for v in values:
        if isinstance(v, bool) or not isinstance(v, (int, np.integer)):
            raise TypeError(f"{name} must be an integer or {rank} integers, got {value!r}")
        if v < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    return tuple(int(v) for v in values)


def broadcast_bools(name: str, value: bool | Sequence[bool], rank: int) -> tuple[bool, ...]:
    """One boolean per axis."""
    if type(value) is bool:
        return (value,) * rank
    values = _broadcast(name, value, rank, "boolean")
    for v in values:
        if not isinstance(v, (bool, np.bool_)):
            raise TypeError(f"{name} must be a boolean or {rank} booleans, got {value!r}")
    return tuple(bool(v) for v in values)


def broadcast_borders(border: str | Sequence[str], rank: int) -> tuple[str, ...]:
    """One border per axis."""
    values = _broadcast("border", border, rank, "name")
    if not all(isinstance(b, str) and b in BORDERS for b in values):
        raise ValueError(f"border must be one of {', '.join(map(repr, BORDERS))}, or one per axis, got {border!r}")
    return values


def _broadcast(name: str, value, rank: int, kind: str) -> tuple:
    if not isinstance(value, (list, tuple)):
        return (value,) * rank
    if len(value) == 1:
        return tuple(value) * rank
    if len(value) != rank:
        raise ValueError(f"{name} must be one {kind} or one per axis ({rank}), got {tuple(value)!r}")
    return tuple(value)


@lru_cache(maxsize=512)
def geometry_of(shape: tuple[int, ...], window: tuple[int, ...]) -> Geometry:
    """The geometry of a map and a flat window, as `split_window` takes it apart.

    Cached, because checking a geometry anew takes longer than launching a small layer.
    """
    kernel_size, stride, dilation, is_causal, border = split_window(window)
    return Geometry(shape, kernel_size, dilation, stride, tuple(map(bool, is_causal)), borders_of(border))


def split_window(window: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """kernel_size, stride, dilation, is_causal and places in BORDERS, each of all axes, out of a flat window."""
    if not window or len(window) % WINDOW_FIELDS:
        raise ValueError(f"a window must have {WINDOW_FIELDS} numbers per axis, got {len(window)}")
    rank = rank_of(window)
    return tuple(tuple(window[i : i + rank]) for i in range(0, len(window), rank))


def borders_of(codes: Sequence[int]) -> tuple[str, ...]:
    """The names of borders that a flat window has by their places."""
    if not all(0 <= code < len(BORDERS) for code in codes):
        raise ValueError(f"a window's borders must be places in {BORDERS}, got {tuple(codes)}")
    return tuple(BORDERS[code] for code in codes)


def rank_of(window: Sequence[int]) -> int:
    """Axes of a flat window."""
    return len(window) // WINDOW_FIELDS
