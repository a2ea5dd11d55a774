"""`natten.utils.varlen`: sequences of different lengths, packed one after the other into one batch item."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from dinat_triton.integrations.natten.arguments import Refused

__all__ = ["generate_varlen_parameters"]

Pair = tuple[Tensor | None, Tensor | None]  # of queries and of keys


def generate_varlen_parameters(
    query: Tensor, key: Tensor, value: Tensor, seqlens_Q: Tensor | None = None, seqlens_KV: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """`natten.utils.varlen.generate_varlen_parameters`: cumulative sums of the lengths, and the longest of each."""
    if torch.compiler.is_compiling():
        raise RuntimeError("generate_varlen_parameters reads lengths, which a compiled graph cannot: call it before")
    if query.shape[0] != key.shape[0] or query.shape[0] != value.shape[0]:
        raise Refused(f"key and value must have the batch of query, {len(query)}, got {len(key)} and {len(value)}")
    if seqlens_Q is None and seqlens_KV is None:
        return None, None, 0, 0
    if seqlens_Q is None or seqlens_KV is None:
        raise Refused("seqlens_Q and seqlens_KV must be given together")
    for name, lengths in (("seqlens_Q", seqlens_Q), ("seqlens_KV", seqlens_KV)):
        _check(name, lengths, query)
    if seqlens_Q.shape != seqlens_KV.shape or len(seqlens_Q) == 0:
        raise Refused(f"seqlens_Q and seqlens_KV must be of one length, got {len(seqlens_Q)} and {len(seqlens_KV)}")
    of_queries, of_keys = (pad(x.cumsum(0, dtype=torch.int32), (1, 0)) for x in (seqlens_Q, seqlens_KV))
    return of_queries, of_keys, int(seqlens_Q.max()), int(seqlens_KV.max())


def packing(
    query: Tensor, key: Tensor, lengths: Pair, cumulative: Pair, longest: tuple[int | None, int | None]
) -> tuple[Tensor, Tensor] | None:
    """A 0 and the cumulative sums of the lengths, of queries and of keys; None if nothing is packed."""
    if any(x is not None for x in lengths):
        *cumulative, _, _ = generate_varlen_parameters(query, key, key, *lengths)  # type: ignore[assignment]
    elif all(x is None for x in cumulative) and not any(longest):
        return None
    elif any(x is None for x in (*cumulative, *longest)):
        raise Refused(
            "cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q and max_seqlen_KV must be given together"
        )
    of_queries, of_keys = cumulative
    assert of_queries is not None
    assert of_keys is not None
    for name, sums in (("cumulative_seqlen_Q", of_queries), ("cumulative_seqlen_KV", of_keys)):
        _check(name, sums, query)
    if len(of_queries) != len(of_keys) or len(of_queries) < 2:
        raise Refused(f"cumulative_seqlen_Q and _KV must be of one length, got {len(of_queries)} and {len(of_keys)}")
    return of_queries, of_keys


def sequences(query: Tensor, key: Tensor, of_queries: Tensor, of_keys: Tensor) -> list[tuple[slice, slice]]:
    """Ranges of the queries and of the keys of each sequence; queries after the last one see no keys."""
    ends = []
    for name, sums, x in (("cumulative_seqlen_Q", of_queries, query), ("cumulative_seqlen_KV", of_keys, key)):
        ends.append([*sums.tolist(), x.shape[1]])
        if ends[-1][0] != 0 or ends[-1] != sorted(ends[-1]):
            raise Refused(f"{name} must ascend from 0 to at most the length {x.shape[1]}, got {ends[-1][:-1]}")
    slices = [[slice(*pair) for pair in pairwise(x)] for x in ends]
    slices[1][-1] = slice(0)
    return list(zip(*slices, strict=True))


def _check(name: str, x: Tensor, query: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.int32 or x.dim() != 1 or x.device != query.device:
        raise Refused(f"{name} must be a 1-D int32 tensor on {query.device}, got {x!r}")
    if len(query) != 1:
        raise Refused(f"query must have batch 1 where sequences are packed into it, got {len(query)}")
