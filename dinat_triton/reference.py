"""Neighborhood attention as it is defined: gather each query's keys, then softmax attention over them.

Plain differentiable torch in any floating dtype, computed in float32 or wider: twice differentiable, forward mode too.
Every other backend is checked against this one. Memory grows with tokens * window.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
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
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attends; tensors are `[batch, *shape, heads, dim]`. Returns the output and the log-sum-exp of the logits."""
    wide, device = accumulator(query.dtype), query.device
    q, k, v = (x.flatten(1, -3).to(wide) for x in (query, key, value))
    heads = q.shape[2]
    tokens, offsets = (torch.as_tensor(index, device=device) for index in geometry.neighbors())
    seen = tokens >= 0
    # A causal or clipped window can be shorter than the rest: its empty places repeat the query's own token, which it
    # always sees, so that nothing from outside the window can leak in, not even a NaN times zero.
    own = torch.arange(geometry.num_tokens, device=device)[:, None]
    tokens = torch.where(seen, tokens, own)

    keys, values = (repeat(x, "b n h d -> b n (h g) d", g=heads // x.shape[2])[:, tokens] for x in (k, v))
    # Products and sums, because autocast would round matrix products, those of the backward too.
    logits = (scale * q[:, :, None] * keys).sum(-1)  # [batch, query, key, head]
    if rpb is not None:
        logits = logits + rearrange(rpb.to(wide).flatten(1)[:, offsets], "h n m -> n m h")
    if key_mask is not None:
        seen = seen & key_mask.flatten(1)[:, tokens]
    logits = logits.masked_fill(~seen[..., None], -torch.inf)
    empty = (logits == -torch.inf).all(2, keepdim=True)  # bias and mask may hide every key of a window
    logits = logits.masked_fill(empty, 0)

    probabilities = logits.softmax(2).masked_fill(empty, 0)
    if seed is not None:
        batch_head = torch.arange(len(q) * heads, device=device).view(-1, 1, 1, heads)
        keep = keep_mask(seed, dropout_p, tokens[..., None], own[..., None], batch_head)
        probabilities = probabilities * keep / (1 - dropout_p)
    out = (probabilities[..., None] * values).sum(2).to(value.dtype)
    lse = logits.logsumexp(2).masked_fill(empty.squeeze(2), -torch.inf)
    return out.unflatten(1, geometry.shape), lse.unflatten(1, geometry.shape)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in, and that of log-sum-exps."""
    return torch.promote_types(dtype, torch.float32)
