"""The relative positional bias as the tiles of a class see it, and its gradient back.

The table of a class holds what is added to the logit of each (row, column) pair: the bias, or -inf where the row does
not see the column. Without a bias the same table is just the mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinat_triton.geometry import row_major_strides
from dinat_triton.plan import AxisTiles, TileClass

# Pairs whose bias indices are made at once: a quarter of a megabyte, which stays in cache.
PAIRS_AT_ONCE = 1 << 16


def pair_indices(tiles: TileClass, device: torch.device) -> Iterator[Tensor]:
    """Yields bias indices of the pairs of a class, `[pairs]`, of some rows at a time, in the order of the rows.

    Masked pairs have that of an entry behind the last.
    """
    masked = tiles.geometry.num_offsets
    (first, *others), (stride, *strides) = tiles.axes, row_major_strides(tiles.geometry.bias_shape)
    inner = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=device)  # [1, rows, 1, columns] of the other axes
    for axis, step in zip(others, strides, strict=True):
        rows, columns = inner.shape[1] * axis.rows, inner.shape[3] * axis.columns
        own = torch.as_tensor(_axis_index(axis, slice(None), step, masked), device=device)
        inner = (inner[:, :, None, :, :, None] + own[:, None, None]).view(1, rows, 1, columns)
    step = max(1, PAIRS_AT_ONCE // (first.columns * inner.numel()))
    for row in range(0, first.rows, step):
        own = torch.as_tensor(_axis_index(first, slice(row, row + step), stride, masked), device=device)
        yield (own[:, None, :, None] + inner).clamp_(max=masked).view(-1)


def _axis_index(axis: AxisTiles, rows: slice, stride: int, masked: int) -> NDArray[np.int32]:
    """An axis's addend to the bias indices of some rows' pairs, `[rows, columns]`."""
    column = np.arange(axis.columns)
    seen = (column >= axis.first[rows, None]) & (column <= axis.last[rows, None])
    row_code, col_code = ((code * stride).astype(np.int32) for code in (axis.row_code[rows], axis.col_code))
    return np.where(seen, row_code[:, None] + col_code, np.int32(masked))


def fill_table(table: Tensor, rpb: Tensor | None, indices: Iterable[Tensor], num_offsets: int) -> None:
    """Writes what to add to the logits of pairs: `[heads, pairs]`, or `[1, pairs]` without a bias."""
    bias = table.new_zeros(1, num_offsets) if rpb is None else rpb.flatten(1).to(table.dtype)
    values, past = torch.cat((bias, bias.new_full((len(bias), 1), -torch.inf)), 1), 0
    for index in indices:
        torch.index_select(values, 1, index, out=table[:, past : past + len(index)])
        past += len(index)


def table_grad(grad: Tensor, indices: Iterable[Tensor], num_offsets: int) -> Tensor:
    """Gradient of the bias, `[heads, offsets]`, from that of a table: every entry adds to the one it came from."""
    sums, past = grad.new_zeros(len(grad), num_offsets + 1), 0
    for index in indices:
        # By 32-bit indices torch would add one by one.
        sums.index_add_(1, index.long(), grad[:, past : past + len(index)])
        past += len(index)
    return sums[:, :-1]
