"""Attentions of the same queries to different keys, put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dinat_triton.checks import DTYPES
from dinat_triton.reference import accumulator


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merges attention to parts of the keys into attention to all of them, with exact gradients of every part.

    Args:
        outs: Of the same queries to different keys, `[..., heads, dim]`.
        lses: Their log-sum-exps, `[..., heads]`. A part has no share in a query for which it is -inf.

    Returns:
        The output in the dtype of the first, and its log-sum-exp; zeros and -inf for queries that see nothing.
    """
    _check(outs, lses)
    wide = accumulator(outs[0].dtype)
    parts = torch.stack([lse.to(wide) for lse in lses])
    # Whatever an empty part holds, NaN even, must not count.
    kept = [out.to(wide).masked_fill(lse.isneginf().unsqueeze(-1), 0) for out, lse in zip(outs, lses, strict=True)]
    empty = parts.isneginf().all(0)
    parts = parts.masked_fill(empty, 0)
    weights = parts.softmax(0).unsqueeze(-1)
    out = sum((w * x for w, x in zip(weights, kept, strict=True)), start=torch.zeros_like(kept[0]))
    return out.to(outs[0].dtype), parts.logsumexp(0).masked_fill(empty, -torch.inf)


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(f"outs must be at least one, with as many lses, got {len(outs)} and {len(lses)}")
    first = outs[0]
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.dtype not in DTYPES or lse.dtype not in DTYPES:
            raise TypeError(f"outs[{i}] and lses[{i}] must be floating tensors, got {out.dtype} and {lse.dtype}")
        if out.ndim < 2 or out.shape != first.shape:
            raise ValueError(f"outs[{i}] must be [..., heads, dim] as the first, got {tuple(out.shape)}")
        if lse.shape != first.shape[:-1]:
            raise ValueError(f"lses[{i}] must have shape {tuple(first.shape[:-1])}, got {tuple(lse.shape)}")
        if out.device != first.device or lse.device != first.device:
            raise ValueError(f"part {i} must be on the device of the first, {first.device}, got {out.device}")
