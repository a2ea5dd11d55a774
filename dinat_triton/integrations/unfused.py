"""Neighborhood attention in two steps with the scores in between, for callers that want to see or change them.

Everything is heads-first, `[batch, heads, *shape, dim]`; scores are `[batch, heads, *shape, window]`, the window in
row-major order. The scores are all that is held; what needs none calls `na1d`, `na2d` or `na3d`.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from dinat_triton.checks import check_tensors
from dinat_triton.functional import Bools, Ints, window_of
from dinat_triton.integrations.pairs import pairs


def scores(
    query: Tensor,
    key: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    is_causal: Bools = False,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """`query . key + rpb` of every query and the keys of its window, not scaled; -inf where a causal window ends.

    Args:
        query: `[batch, heads, *shape, dim]`.
        key: As query.
        kernel_size: Keys in a window along each axis.
        dilation: Distance between neighboring keys of a window.
        is_causal: Whether a query sees only keys at or before its own position on that axis.
        rpb: Relative positional bias `[heads, 2 * kernel_size - 1 per axis]`, of any floating dtype.
        additional_keys: `[batch, heads, count, dim]` that every query sees too; their scores come last.
    """
    last = key.movedim(1, -2)
    check_tensors(query.movedim(1, -2), last, last)
    shape = query.shape[2:-1]
    window = window_of(len(shape), kernel_size, 1, dilation, is_causal)
    if rpb is not None:
        _check_shape("rpb", rpb, (query.shape[1], *(2 * k - 1 for k in window[: len(shape)])))
    logits = pairs("dot", query, key, window, rpb, -torch.inf)
    if additional_keys is None:
        return logits
    _check_shape("additional_keys", additional_keys, (*query.shape[:2], additional_keys.shape[-2], query.shape[-1]))
    additional = query.flatten(2, -2) @ additional_keys.transpose(-2, -1)
    return torch.cat([logits, additional.unflatten(2, shape)], -1)


def aggregate(
    probabilities: Tensor,
    value: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    is_causal: Bools = False,
    additional_values: Tensor | None = None,
) -> Tensor:
    """The values of every query's window, weighted.

    Args:
        probabilities: `[batch, heads, *shape, window]`, as `scores` orders them; cast to the dtype of value.
        value: `[batch, heads, *shape, dim]`.
        kernel_size: Keys in a window along each axis.
        dilation: Distance between neighboring keys of a window.
        is_causal: Whether a query sees only keys at or before its own position on that axis.
        additional_values: `[batch, heads, count, dim]`, of the additional keys.
    """
    shape = value.shape[2:-1]
    window = window_of(len(shape), kernel_size, 1, dilation, is_causal)
    width = prod(window[: len(shape)])
    extra = 0 if additional_values is None else additional_values.shape[-2]
    _check_shape("attn", probabilities, (*value.shape[:-1], width + extra))
    probabilities = probabilities.to(value.dtype)
    out = pairs("pull", probabilities[..., :width], value, window)
    if additional_values is None:
        return out
    _check_shape("additional_values", additional_values, (*value.shape[:2], extra, value.shape[-1]))
    return out + (probabilities[..., width:].flatten(2, -2) @ additional_values).unflatten(2, shape)


def _check_shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(x.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")
