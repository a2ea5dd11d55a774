"""Neighborhood attention by brute force: plain loops over the queries find their keys, by one window formula per axis.

Slow, and written from the definition alone, so that it shares nothing with the code that it checks.
"""

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Window = tuple[list[int], list[int]]


def windows(size: int, kernel: int, dilation: int, stride: int, causal: bool, border: str = "shift") -> list[Window]:
    """Per query of one axis: the positions of its keys, and their offsets from it in dilation units."""
    if border != "shift":
        return _windows_of_a_line(size, kernel, dilation, stride, causal, border)
    if not (1 <= stride <= kernel and dilation >= 1 and kernel * dilation <= size):
        raise ValueError(f"not a valid axis: {size=}, {kernel=}, {dilation=}, {stride=}")
    result = []
    for position in range(size):
        group, query = position % dilation, position // dilation
        length = math.ceil((size - group) / dilation)
        start, end = _span(query, length, kernel, stride, causal)
        members = range(start, end)
        result.append(([c * dilation + group for c in members], [c - query for c in members]))
    return result


def _windows_of_a_line(size: int, kernel: int, dilation: int, stride: int, causal: bool, border: str) -> list[Window]:
    """Windows as on a line without ends, of which those keys remain that exist, or all, on a circle."""
    if border == "wrap" and (size % dilation or kernel * dilation > size):
        raise ValueError(f"not a valid circle: {size=}, {kernel=}, {dilation=}")
    result = []
    for position in range(size):
        member = position // dilation % stride  # of a group of queries that share a window
        centre = stride - 1 if causal else stride // 2
        reach = (centre - kernel + 1, centre) if causal else (centre - kernel // 2, centre + (kernel - 1) // 2)
        offsets = [
            o for o in range(1 - kernel, kernel) if reach[0] <= member + o <= reach[1] and not (causal and o > 0)
        ]
        if border == "clip":
            offsets = [o for o in offsets if 0 <= position + o * dilation < size]
        result.append(([(position + o * dilation) % size for o in offsets], offsets))
    return result


def _span(query: int, length: int, kernel: int, stride: int, causal: bool) -> tuple[int, int]:
    """First key and one past the last key, as indices in a residue class of `length` tokens."""
    first_of_stride_group = (query // stride) * stride
    if causal:
        lead = min(first_of_stride_group + stride - 1, length - 1)
        return max(lead - kernel + 1, 0), min(query + 1, length)
    lead = min(first_of_stride_group + stride // 2, length - 1)
    start = min(max(lead - kernel // 2, 0), length - kernel)
    return start, start + kernel


@cache
def table(shape: Sequence[int], *window: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Per query and slot of the whole kernel's row-major window: the key and its place in the flat bias, -1 if none.

    `window` is kernel_size, dilation, stride, is_causal and border, a value per axis.
    """
    kernel_size, axes = np.array(window[0]), [windows(*axis) for axis in zip(shape, *window, strict=True)]
    found = torch.full((2, math.prod(shape), math.prod(window[0])), -1)
    for query, hood in enumerate(itertools.product(*axes)):
        keys, pairs = (np.array([*itertools.product(*each)]) for each in zip(*hood, strict=True))
        slots = np.ravel_multi_index((pairs - pairs[0]).T, kernel_size)
        places = np.ravel_multi_index((pairs + kernel_size - 1).T, 2 * kernel_size - 1)
        found[:, query, slots] = torch.tensor(np.stack((np.ravel_multi_index(keys.T, shape), places)))
    return found[0], found[1]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    border: Sequence[str],
    rpb: Tensor | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, H, Dv]` and logsumexp `[B, *spatial, H]` in fp64, differentiable in every tensor."""
    shape, (heads, dim) = query.shape[1:-2], query.shape[-2:]
    keys, places = table(tuple(shape), kernel_size, dilation, stride, is_causal, border)
    query = query.double().flatten(1, -3)
    # [batch, queries, slots, heads, dim]
    key, value = (x.double().flatten(1, -3).repeat_interleave(heads // x.shape[-2], -2)[:, keys] for x in (key, value))
    logits = (dim**-0.5 if scale is None else scale) * torch.einsum("bqhd,bqkhd->bhqk", query, key)
    if rpb is not None:
        logits = logits + rpb.double().flatten(1)[:, places]
    seen = keys >= 0 if key_mask is None else (keys >= 0) & key_mask.flatten(1)[:, keys]
    logits = logits.masked_fill(~seen.view(-1, 1, *keys.shape), -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse.isneginf(), 0)[..., None]).exp()
    out = torch.einsum("bhqk,bqkhd->bqhd", weights, value)
    return out.unflatten(1, shape), lse.movedim(1, -1).unflatten(1, shape)
