"""Neighborhood attention by brute force: plain loops over batch, head and query, one window formula per axis.

Slow, and written from the definition alone, so that it shares nothing with the code that it checks.
"""

import itertools
import math
from collections.abc import Sequence

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
    batch, *shape, heads, dim = query.shape
    sharing = heads // key.shape[-2]
    scale = dim**-0.5 if scale is None else scale
    q, k, v = (t.double().flatten(1, len(shape)) for t in (query, key, value))
    bias = None if rpb is None else rpb.double()
    hoods = neighborhoods(shape, kernel_size, dilation, stride, is_causal)
    out, lse = [], []
    for b in range(batch):
        for i, (keys, pairs) in enumerate(hoods):
            for h in range(heads):
                logits = scale * (k[b, keys, h // sharing] @ q[b, i, h])
                if bias is not None:
                    logits = logits + torch.stack([bias[(h, *pair)] for pair in pairs])
                lse.append(logits.logsumexp(0))
                out.append((logits - lse[-1]).exp() @ v[b, keys, h // sharing])
    return (
        torch.stack(out).view(batch, *shape, heads, value.shape[-1]),
        torch.stack(lse).view(batch, *shape, heads),
    )
