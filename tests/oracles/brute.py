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


def windows(size: int, kernel: int, dilation: int, stride: int, causal: bool) -> list[Window]:
    """Per query of one axis: the positions of its keys, and their offsets from it in dilation units."""
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


def _span(query: int, length: int, kernel: int, stride: int, causal: bool) -> tuple[int, int]:
    """First key and one past the last key, as indices in a residue class of `length` tokens."""
    first_of_stride_group = (query // stride) * stride
    if causal:
        lead = min(first_of_stride_group + stride - 1, length - 1)
        return max(lead - kernel + 1, 0), min(query + 1, length)
    lead = min(first_of_stride_group + stride // 2, length - 1)
    start = min(max(lead - kernel // 2, 0), length - kernel)
    return start, start + kernel


def neighborhoods(
    shape: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
) -> list[tuple[list[int], list[tuple[int, ...]]]]:
    """Per query in raster order: its keys as raster indices, and the index of each pair in the bias table."""
    axes = [windows(*axis) for axis in zip(shape, kernel_size, dilation, stride, is_causal, strict=True)]
    result = []
    for query in itertools.product(*axes):
        keys = [_raster(point, shape) for point in itertools.product(*(positions for positions, _ in query))]
        pairs = itertools.product(*(offsets for _, offsets in query))
        result.append((keys, [tuple(o + k - 1 for o, k in zip(pair, kernel_size, strict=True)) for pair in pairs]))
    return result


def _raster(point: Sequence[int], shape: Sequence[int]) -> int:
    index = 0
    for coordinate, size in zip(point, shape, strict=True):
        index = index * size + coordinate
    return index


@cache
def table(shape: Sequence[int], *window: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Per query and slot of the whole kernel's row-major window: the key and its place in the flat bias, -1 if none."""
    kernel_size = window[0]
    hoods = neighborhoods(shape, *window)
    found = torch.full((2, len(hoods), math.prod(kernel_size)), -1)
    for query, (keys, pairs) in enumerate(hoods):
        at = np.array(pairs)
        slots = np.ravel_multi_index((at - at[0]).T, kernel_size)
        places = np.ravel_multi_index(at.T, [2 * k - 1 for k in kernel_size])
        found[:, query, slots] = torch.tensor(np.stack((keys, places)))
    return found[0], found[1]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    rpb: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, H, Dv]` and logsumexp `[B, *spatial, H]` in fp64, differentiable in every tensor."""
    shape, (heads, dim) = query.shape[1:-2], query.shape[-2:]
    keys, places = table(tuple(shape), kernel_size, dilation, stride, is_causal)
    query = query.double().flatten(1, -3)
    # [batch, queries, slots, heads, dim]
    key, value = (x.double().flatten(1, -3).repeat_interleave(heads // x.shape[-2], -2)[:, keys] for x in (key, value))
    logits = (dim**-0.5 if scale is None else scale) * torch.einsum("bqhd,bqkhd->bhqk", query, key)
    if rpb is not None:
        logits = logits + rpb.double().flatten(1)[:, places]
    logits = logits.masked_fill(keys < 0, -torch.inf)
    out = torch.einsum("bhqk,bqkhd->bqhd", logits.softmax(-1), value)
    return out.unflatten(1, shape), logits.logsumexp(-1).movedim(1, -1).unflatten(1, shape)
