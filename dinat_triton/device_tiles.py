"""A tile class on a device, as the backends in pure torch read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dinat_triton.plan import TileClass


@dataclass(frozen=True, eq=False)
class DeviceTiles:
    """The vectors of a tile class: a token is its tile's base plus an offset of the class."""

    rows: Tensor  # [R] offsets
    columns: Tensor  # [S] offsets
    row_base: Tensor  # [tiles] tokens
    col_base: Tensor  # [tiles] tokens

    def split(self, maps: int, most_scores: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the bases of as many tiles at a time as have at most so many scores over all maps."""
        step = max(1, most_scores // (maps * len(self.rows) * len(self.columns)))
        yield from zip(self.row_base.split(step), self.col_base.split(step), strict=True)


def vectors_of(c: TileClass, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Offsets and bases of a class on a device, as `DeviceTiles` begins with them."""
    rows, columns, row_base, col_base = (
        torch.as_tensor(x, device=device) for x in (c.rows, c.columns, c.row_base, c.col_base)
    )
    return rows, columns, row_base, col_base
