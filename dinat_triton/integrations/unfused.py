"""Neighborhood attention in two steps with the scores in between, for callers that want to see or change them.

Everything is heads-first, `[batch, heads, *shape, dim]`; scores are `[batch, heads, *shape, window]`, the window in
row-major order. Memory grows with the window: what needs no scores calls `na1d`, `na2d` or `na3d`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinat_triton.checks import check_tensors
from dinat_triton.functional import Bools, Ints, window_of
from dinat_triton.geometry import geometry_of


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
        rpb: Relative positional bias `[heads, 2 * kernel_size - 1 per axis]`.
        additional_keys: `[batch, heads, count, dim]` that every query sees too; their scores come last.
    """
    last = key.movedim(1, -2)
    check_tensors(query.movedim(1, -2), last, last)
    shape, window = _problem(query, kernel_size, dilation, is_causal)
    tokens, offsets = _neighbors(shape, window, query.device)
    keys = key.flatten(2, -2)[:, :, tokens.clamp(min=0)]
    logits = torch.einsum("bhnd,bhnkd->bhnk", query.flatten(2, -2), keys)
    if rpb is not None:
        expected = (query.shape[1], *(2 * k - 1 for k in window[: len(shape)]))
        if tuple(rpb.shape) != expected:
            raise ValueError(f"rpb must have shape {expected}, got {tuple(rpb.shape)}")
        logits = logits + rpb.flatten(1)[:, offsets]
    logits = logits.masked_fill(tokens < 0, -torch.inf)
    if additional_keys is not None:
        logits = torch.cat([logits, query.flatten(2, -2) @ additional_keys.transpose(-2, -1)], -1)
    return logits.unflatten(2, shape)


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
        probabilities: `[batch, heads, *shape, window]`, as `scores` orders them.
        value: `[batch, heads, *shape, dim]`.
        kernel_size: Keys in a window along each axis.
        dilation: Distance between neighboring keys of a window.
        is_causal: Whether a query sees only keys at or before its own position on that axis.
        additional_values: `[batch, heads, count, dim]`, of the additional keys.
    """
    shape, window = _problem(value, kernel_size, dilation, is_causal)
    tokens, _ = _neighbors(shape, window, value.device)
    width = tokens.shape[1]
    extra = 0 if additional_values is None else additional_values.shape[2]
    expected = (*value.shape[:-1], width + extra)
    if probabilities.shape != expected:
        raise ValueError(f"attn must have shape {tuple(expected)}, got {tuple(probabilities.shape)}")
    weights = probabilities.flatten(2, -2)
    inside = weights[..., :width].masked_fill(tokens < 0, 0)
    out = torch.einsum("bhnk,bhnkd->bhnd", inside, value.flatten(2, -2)[:, :, tokens.clamp(min=0)])
    if additional_values is not None:
        out = out + weights[..., width:] @ additional_values
    return out.unflatten(2, shape)


def _problem(x: Tensor, kernel_size: Ints, dilation: Ints, is_causal: Bools) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The map of a heads-first tensor, and the flat window on it."""
    shape = tuple(int(n) for n in x.shape[2:-1])
    return shape, tuple(window_of(len(shape), kernel_size, 1, dilation, is_causal))


@torch.compiler.assume_constant_result  # the compiler cannot trace a geometry, and this is a constant to it
def _neighbors(shape: tuple[int, ...], window: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and bias indices of the keys of every query, `[tokens, window]`, -1 where a causal window is shorter."""
    tokens, offsets = geometry_of(shape, window).neighbors()
    return torch.as_tensor(tokens, device=device), torch.as_tensor(offsets, device=device)
