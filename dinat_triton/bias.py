"""The relative positional bias as the tiles of a plan see it, and its gradient back.

`rel` holds the bias index of each (row, column) pair of a tile class, or MASKED. The table holds what is added to that
pair's logit: the bias, or -inf. Without a bias the same table is just the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinat_triton.plan import MASKED


def table(rpb: Tensor | None, rel: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What to add to the logits.

    Args:
        rpb: Bias `[heads, *bias_shape]`, or None.
        rel: Bias indices, any shape.
        dtype: Of the result.

    Returns:
        `[heads, *rel.shape]`, or `[1, *rel.shape]` without a bias.
    """
    if rpb is None:
        mask = torch.zeros(rel.shape, dtype=dtype, device=rel.device)
        return mask.masked_fill_(rel == MASKED, -torch.inf).unsqueeze(0)
    # MASKED is -1, so one more column at the end of the bias is what masked pairs pick.
    values = torch.nn.functional.pad(rpb.flatten(1).to(dtype), (0, 1), value=-torch.inf)
    index = rel.flatten().remainder(values.shape[1])
    return values.gather(1, index.expand(len(values), -1)).unflatten(1, rel.shape)


def table_grad(grad: Tensor, rel: Tensor, bias_shape: tuple[int, ...]) -> Tensor:
    """Gradient of `rpb` from that of its table: every entry adds to the bias it came from."""
    num_offsets = torch.Size(bias_shape).numel()
    sums = grad.new_zeros(len(grad), num_offsets + 1)
    sums.index_add_(1, rel.flatten().remainder(num_offsets + 1), grad.flatten(1))
    return sums[:, :num_offsets].contiguous().unflatten(1, bias_shape)
