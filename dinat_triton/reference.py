"""Neighborhood attention as it is defined: gather each query's keys, then softmax attention over them.

Plain differentiable torch in any floating dtype: twice differentiable, forward mode too. Every other backend is checked
against this one. Memory grows with tokens * window.
"""

from __future__ import annotations

import torch
from einops import einsum, repeat
from torch import Tensor

from dinat_triton.dropout import keep_mask
from dinat_triton.geometry import Geometry


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    seed: Tensor | None,
    geometry: Geometry,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Attends; tensors are `[batch, *shape, heads, dim]`. Returns the output and the log-sum-exp of the logits."""
    q, k, v = (x.flatten(1, -3) for x in (query, key, value))
    heads, device = q.shape[2], q.device
    tokens, offsets = (torch.as_tensor(index, device=device) for index in geometry.neighbors())
    seen = tokens >= 0
    # A causal window can be shorter than the rest: its empty places repeat the query's own token, which it always sees,
    # so that nothing from outside the window can leak in, not even a NaN times zero.
    own = torch.arange(geometry.num_tokens, device=device)[:, None]
    tokens = torch.where(seen, tokens, own)

    keys, values = (repeat(x, "b n h d -> b n (h g) d", g=heads // x.shape[2])[:, tokens] for x in (k, v))
    logits = einsum(q * scale, keys, "b n h d, b n m h d -> b h n m").to(accumulator(q.dtype))
    if rpb is not None:
        logits = logits + rpb.flatten(1)[:, offsets]
    logits = logits.masked_fill(~seen, -torch.inf)

    probabilities = logits.softmax(-1)
    if seed is not None:
        batch_head = torch.arange(logits.shape[0] * heads, device=device).view(-1, heads, 1, 1)
        keep = keep_mask(seed, dropout_p, tokens, own, batch_head)
        probabilities = probabilities * keep / (1 - dropout_p)
    out = einsum(probabilities.to(v.dtype), values, "b h n m, b n m h d -> b n h d")
    lse = logits.logsumexp(-1).transpose(1, 2)
    return out.unflatten(1, geometry.shape), lse.unflatten(1, geometry.shape)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and log-sum-exps."""
    return torch.promote_types(dtype, torch.float32)
