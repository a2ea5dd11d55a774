"""`natten.attention` and `natten.merge_attentions`: every query to all keys, and parts of an attention put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinat_triton.functional import na1d, na2d
from dinat_triton.fused import LIBRARY
from dinat_triton.integrations.natten.arguments import KNOBS, Refused, our_backend, refusing
from dinat_triton.integrations.natten.eight_bit import takes_eight_bit
from dinat_triton.integrations.natten.varlen import packing, sequences
from dinat_triton.merging import merge
from dinat_triton.reference import accumulator

__all__ = ["attention", "merge_attentions"]

Output = tuple[Tensor, Tensor]  # with its log-sum-exp


@takes_eight_bit
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    *,
    return_lse: bool = False,
    **knobs: Any,
) -> Tensor | Output:
    """`natten.attention`: every query attends to all keys, or to those of its own sequence.

    Args:
        query: `[batch, length, heads, dim]`.
        key: `[batch, key length, heads, dim]`; may have fewer heads.
        value: As key; may have another dim.
        is_causal: Whether a query sees only keys at or before its own position, both counted from the first.
        scale: Of the dot products; `dim ** -0.5` by default.
        seqlens_Q: Lengths of the sequences that are packed into one batch item, int32.
        seqlens_KV: Of their keys.
        cumulative_seqlen_Q: Instead of lengths, a 0 and their cumulative sums.
        cumulative_seqlen_KV: Of their keys.
        max_seqlen_Q: The longest; required with cumulative sums.
        max_seqlen_KV: Of their keys.
        backend: One of ours chooses, one of NATTEN's has no effect.
        return_lse: Whether to return the log-sum-exp too.
        **knobs: NATTEN's choices of kernels, which have no effect.
    """
    if unknown := sorted(knobs.keys() - KNOBS):
        raise TypeError(f"attention has no argument {', '.join(unknown)}")
    backend = our_backend(backend)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise Refused(f"{name} must be [batch, length, heads, dim], got shape {tuple(x.shape)}")
    if key.shape[:2] != value.shape[:2]:
        raise Refused(f"value must have the batch and length of key, {tuple(key.shape[:2])}, got {tuple(value.shape)}")
    lengths = (seqlens_Q, seqlens_KV), (cumulative_seqlen_Q, cumulative_seqlen_KV), (max_seqlen_Q, max_seqlen_KV)
    options = (is_causal, scale, backend)
    with refusing():
        sums = packing(query, key, *lengths)
        if sums is None:
            out, lse = _attend(query, key, value, *options)
        else:
            call = PACKED if torch.compiler.is_compiling() else _packed
            out, lse = call(*_autocast(query, key, value), *sums, *options)
    return (out, lse) if return_lse else out


def _attend(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, backend: str | None
) -> Output:
    """Attention of one sequence."""
    n, m = query.shape[1], key.shape[1]
    if n == 0 or m == 0:
        # Sums of nothing are zeros that belong to the graph: their gradients are zeros too, and not missing.
        zero = query[..., :0].sum(-1, keepdim=True) + key[:, :0].sum() + value[:, :0].sum()
        return zero.expand(*zero.shape[:-1], value.shape[-1]), zero.squeeze(-1).to(accumulator(zero.dtype)) - torch.inf
    if not is_causal:
        return attend_to_all(query, key, value, scale, backend)
    if n > m:  # queries behind the last key see all of them
        first = _attend(query[:, :m], key, value, True, scale, backend)
        rest = attend_to_all(query[:, m:], key, value, scale, backend)
        return torch.cat((first[0], rest[0]), 1), torch.cat((first[1], rest[1]), 1)
    return na1d(query, key[:, :n], value[:, :n], n, is_causal=True, scale=scale, return_lse=True, backend=backend)


def attend_to_all(query: Tensor, key: Tensor, value: Tensor, scale: float | None, backend: str | None) -> Output:
    """Attention of all queries `[batch, n, heads, dim]` to all keys `[batch, m, heads, dim]`.

    It is neighborhood attention too: on a map whose rows are as long as the shorter of both, with a window of a row.
    Either the keys or the queries are those of every row; in the latter case the rows are parts to merge.
    """
    n, m = query.shape[1], key.shape[1]
    length = min(n, m)
    rows = -(-n // m) if n >= m else m // n
    options: dict[str, Any] = {"scale": scale, "return_lse": True, "backend": backend}
    if n >= m:
        query = torch.nn.functional.pad(query, (0, 0, 0, 0, 0, rows * m - n)).unflatten(1, (rows, m))
        key, value = (x.unsqueeze(1).expand(-1, rows, -1, -1, -1) for x in (key, value))
        out, lse = na2d(query, key, value, (1, length), **options)
        return out.flatten(1, 2)[:, :n], lse.flatten(1, 2)[:, :n]
    whole = rows * n
    row_keys, row_values = (x[:, :whole].unflatten(1, (rows, n)) for x in (key, value))
    out, lse = na2d(query.unsqueeze(1).expand(-1, rows, -1, -1, -1), row_keys, row_values, (1, length), **options)
    outs, lses = [*out.unbind(1)], [*lse.unbind(1)]
    if whole < m:
        rest = attend_to_all(query, key[:, whole:], value[:, whole:], scale, backend)
        outs, lses = [*outs, rest[0]], [*lses, rest[1]]
    return merge(outs, lses)


def merge_attentions(
    outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor], torch_compile: bool = True, use_autograd_fix: bool = True
) -> Output:
    """`natten.merge_attentions`: what attention to all keys at once would have given, with its gradients.

    Args:
        outputs: Of the same queries to different keys, `[batch, length, heads, dim]`.
        lse_tensors: Their log-sum-exps, `[batch, length, heads]`.
        torch_compile: Has no effect.
        use_autograd_fix: Has no effect: gradients need no fix.
    """
    if len(outputs) < 2 or len(outputs) != len(lse_tensors):
        raise Refused(f"outputs must be two or more, with a lse_tensor each, got {len(outputs)} and {len(lse_tensors)}")
    shape = outputs[0].shape
    for i, (out, lse) in enumerate(zip(outputs, lse_tensors, strict=True)):
        if out.dim() != 4 or out.shape != shape:
            raise Refused(f"outputs[{i}] must be [batch, length, heads, dim] as the first, got {tuple(out.shape)}")
        if lse.shape != shape[:3]:
            raise Refused(f"lse_tensors[{i}] must have shape {tuple(shape[:3])}, got {tuple(lse.shape)}")
    return merge(outputs, lse_tensors)


# Packed sequences in a compiled graph are an op, which reads where they end when it runs.
LIBRARY.define(
    "packed(Tensor query, Tensor key, Tensor value, Tensor of_queries, Tensor of_keys, bool is_causal, float? scale, "
    "str? backend) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "packed_backward(Tensor query, Tensor key, Tensor value, Tensor of_queries, Tensor of_keys, bool is_causal, "
    "float? scale, str? backend, Tensor grad_out, Tensor grad_lse) -> (Tensor, Tensor, Tensor)"
)
PACKED, PACKED_BACKWARD = torch.ops.dinat_triton.packed.default, torch.ops.dinat_triton.packed_backward.default


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as autocast wants them, which is off where a compiled graph runs its ops."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    low = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(low) for x in tensors)


def _packed(query: Tensor, key: Tensor, value: Tensor, of_queries: Tensor, of_keys: Tensor, *options: Any) -> Output:
    """Attention of each sequence."""
    parts = [
        _attend(query[:, rows], key[:, columns], value[:, columns], *options)
        for rows, columns in sequences(query, key, of_queries, of_keys)
    ]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 1)


def _packed_fake(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> Output:
    shape = query.shape[:-1]
    return query.new_empty(*shape, value.shape[-1]), query.new_empty(shape, dtype=accumulator(query.dtype))


def _packed_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of query, key and value. The forward is worked out again, so that nothing has to be kept of it."""
    *inputs, grad_out, grad_lse = arguments
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    with torch.enable_grad():
        outputs = _packed(*leaves, *inputs[3:])
        # Sequences without queries or without keys have no part in any output.
        grads = torch.autograd.grad(outputs, leaves, (grad_out, grad_lse), materialize_grads=True)
    return tuple(grad.contiguous() for grad in grads)


def _packed_backward_fake(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return *PACKED_BACKWARD(*ctx.saved_tensors, *ctx.options, *grads), *[None] * 5


LIBRARY.impl("packed", _packed, "CompositeExplicitAutograd")
LIBRARY.impl("packed_backward", _packed_backward, "CompositeExplicitAutograd")
torch.library.register_fake("dinat_triton::packed", _packed_fake, lib=LIBRARY)
torch.library.register_fake("dinat_triton::packed_backward", _packed_backward_fake, lib=LIBRARY)
torch.library.register_autograd("dinat_triton::packed", _gradients, setup_context=_save, lib=LIBRARY)
