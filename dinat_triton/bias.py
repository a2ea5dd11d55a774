"""The relative positional bias as the tiles of a plan see it, and its gradient back.

`rel` holds the bias index of each (row, column) pair of a tile class, or MASKED. The table holds what is added to that
pair's logit: the bias, or -inf. Without a bias the same table is just the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinat_triton.geometry import Geometry
from dinat_triton.plan import MASKED


def pair_index(rel: Tensor, geometry: Geometry) -> Tensor:
    """`rel` as flat indices into a bias that has one more entry, for the masked pairs."""
    return rel.flatten().masked_fill(rel.flatten() == MASKED, geometry.num_offsets)


def table(rpb: Tensor | None, index: Tensor, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """What to add to the logits of some pairs.

    Args:
        rpb: Bias `[heads, *bias_shape]`, or None.
        index: The pairs' bias indices, from `pair_index`.
        geometry: Of the bias.
        dtype: Of the result.

    Returns:
        `[heads, pairs]`, or `[1, pairs]` without a bias.
    """
    bias = torch.zeros(1, geometry.num_offsets, device=index.device) if rpb is None else rpb.flatten(1)
    masked = bias.new_full((len(bias), 1), -torch.inf, dtype=dtype)
    values = torch.cat((bias.to(dtype), masked), 1)
    return values.gather(1, index.expand(len(values), -1))


def table_grad(grad: Tensor, index: Tensor, geometry: Geometry) -> Tensor:
    """Gradient of `rpb` from that of its table `[heads, pairs]`: every entry adds to the bias it came from."""
    sums = grad.new_zeros(len(grad), geometry.num_offsets + 1)
    sums.index_add_(1, index, grad)
    return sums[:, :-1].contiguous().view(-1, *geometry.bias_shape)
