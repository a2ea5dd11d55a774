"""The relative positional bias as the tiles of a class see it, and its gradient back.

The table of a class holds what is added to the logit of each (row, column) pair: the bias, or -inf where the row does
not see the column. Without a bias the same table is just the mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dinat_triton.geometry import row_major_strides
from dinat_triton.plan import MASKED, TileClass


def axis_indices(tiles: TileClass, device: torch.device) -> list[Tensor]:
    """What each axis adds to the bias index of a pair, shaped to broadcast over all rows and columns."""
    rank, bias_shape = tiles.geometry.rank, tiles.geometry.bias_shape
    found = []
    for axis, stride in enumerate(row_major_strides(bias_shape)):
        rel = tiles.axes[axis].rel()
        spread = [1] * (2 * rank)
        spread[axis], spread[rank + axis] = rel.shape
        rel = np.where(rel == MASKED, tiles.geometry.num_offsets, rel * stride)
        found.append(torch.as_tensor(rel.reshape(spread), device=device))
    return found


def pair_index(per_axis: Sequence[Tensor], num_offsets: int) -> Tensor:
    """Bias index of every pair of a class, `[pairs]`; masked pairs have that of an entry behind the last."""
    index = per_axis[0]
    for part in per_axis[1:]:
        index = index + part
    return index.clamp(max=num_offsets).view(-1)


def table(rpb: Tensor | None, index: Tensor, num_offsets: int, dtype: torch.dtype) -> Tensor:
    """What to add to the logits of some pairs: `[heads, pairs]`, or `[1, pairs]` without a bias."""
    bias = torch.zeros(1, num_offsets, device=index.device) if rpb is None else rpb.flatten(1)
    masked = bias.new_full((len(bias), 1), -torch.inf, dtype=dtype)
    values = torch.cat((bias.to(dtype), masked), 1)
    return values.gather(1, index.expand(len(values), -1))


def table_grad(grad: Tensor, index: Tensor, num_offsets: int) -> Tensor:
    """Gradient of the bias, `[heads, offsets]`, from that of a table: every entry adds to the one it came from."""
    sums = grad.new_zeros(len(grad), num_offsets + 1)
    return sums.index_add_(1, index, grad)[:, :-1]
