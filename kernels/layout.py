"""A plan as the kernels read it: dense index arrays on the device, cut into runs of tiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from dinat_triton.plan import MASKED, PADDING, Plan


@dataclass(frozen=True)
class Layout:
    """Index arrays of a plan.

    Attributes:
        row_tokens: `[tiles, ROWS]`, tiles of a class in a row. Their dtype is that of all token addresses.
        col_tokens: `[tiles, max_chunks * CHUNK]`.
        rel: `[classes, ROWS, max_chunks * CHUNK]` bias indices, or MASKED.
        runs: `[runs, 4]`: class, first tile, end, chunks. A program walks one run.
        first_run: `[classes + 1]`: where each class's runs begin.
    """

    plan: Plan
    max_chunks: int
    row_tokens: Tensor
    col_tokens: Tensor
    rel: Tensor
    runs: Tensor
    first_run: Tensor

    @property
    def rows(self) -> int:
        return self.row_tokens.shape[1]

    @property
    def pairs(self) -> int:
        """(row, column) pairs of one tile class."""
        return self.rel[0].numel()

    @cached_property
    def members(self) -> Tensor:
        """`[offsets, longest]`: the pairs of all classes that each bias entry is added to, padded with -1."""
        # Anew from the plan: reading it back from the device would wait for it.
        rel = _rel(self.plan, self.max_chunks * self.plan.chunk).ravel()
        order = np.argsort(rel, kind="stable")[np.count_nonzero(rel == MASKED) :]
        counts = np.bincount(rel[order], minlength=self.plan.geometry.num_offsets)
        members = np.full((len(counts), counts.max()), -1, dtype=np.int32)
        column = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        members[rel[order], column] = order
        return torch.as_tensor(members, device=self.rel.device)


@lru_cache(maxsize=256)
def layout_of(plan: Plan, tiles_per_run: int, wide: bool, device: torch.device) -> Layout:
    """Lays a plan out.

    Args:
        plan: With `block` and `chunk` as the kernel takes them.
        tiles_per_run: Tiles that a program walks, at most.
        wide: Whether token addresses within a batch item need 64 bits.
        device: Where to.
    """
    chunks = [c.col_tokens.shape[1] // plan.chunk for c in plan.classes]
    max_chunks = max(chunks)
    span = max_chunks * plan.chunk

    runs, first_run, first = [], [0], 0
    for index, c in enumerate(plan.classes):
        end = first + len(c.row_tokens)
        starts = range(first, end, tiles_per_run)
        runs += [(index, start, min(start + tiles_per_run, end), chunks[index]) for start in starts]
        first_run.append(len(runs))
        first = end

    def place(arrays: np.ndarray | list[tuple] | list[int], dtype: type = np.int32) -> Tensor:
        return torch.as_tensor(np.asarray(arrays, dtype=dtype), device=device)

    address = np.int64 if wide else np.int32

    return Layout(
        plan=plan,
        max_chunks=max_chunks,
        row_tokens=place(np.concatenate([c.row_tokens for c in plan.classes]), address),
        col_tokens=place(np.concatenate([_widen(c.col_tokens, span, PADDING) for c in plan.classes]), address),
        rel=place(_rel(plan, span)),
        runs=place(runs),
        first_run=place(first_run),
    )


def _rel(plan: Plan, span: int) -> np.ndarray:
    return np.stack([_widen(c.rel, span, MASKED) for c in plan.classes])


def _widen(array: np.ndarray, columns: int, fill: int) -> np.ndarray:
    return np.pad(array, ((0, 0), (0, columns - array.shape[1])), constant_values=fill)
