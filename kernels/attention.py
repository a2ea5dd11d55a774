"""The `triton` backend: the launches of a forward and of a backward, and the tensors that they write."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dinat_triton.dropout import threshold
from dinat_triton.geometry import Geometry
from dinat_triton.kernels.configs import Preset
from dinat_triton.kernels.prepare import (
    ALIGNMENT,
    Backward,
    Launch,
    Place,
    prepare_backward,
    prepare_forward,
)
from dinat_triton.map_batch import MapBatch
from dinat_triton.packing import split_mask, unpack, unpack_grads


def forward(
    qkv: list[Tensor],
    rpb: Tensor | None,
    seed: Tensor | None,
    geometry: Geometry | MapBatch,
    scale: float,
    dropout_p: float,
    need_lse: bool,
    preset: Preset | None = None,
) -> tuple[Tensor, Tensor]:
    """Attends; query, key and value are `[batch, *shape, heads, dim]`. The backward always needs the log-sum-exp."""
    if _is_odd(qkv):
        out, lse = forward(_widened(qkv), rpb, seed, geometry, scale, dropout_p, need_lse, preset)
        return out[..., : unpack(qkv)[2].shape[-1]].contiguous(), lse
    query, _, value = inputs = unpack(qkv)
    key_mask, rows = _mask_bytes(qkv), query.shape[:-1]
    has_padding = isinstance(geometry, MapBatch) and geometry.shape is not None
    new = query.new_zeros if has_padding else query.new_empty
    out, lse = new(*rows, value.shape[-1]), new(*rows, dtype=torch.float32)
    inputs, given = _items(inputs, geometry), (seed is not None, key_mask is not None, preset)
    launch, uneven = prepare_forward(geometry, _places(inputs), *_kind(query, rpb), *given)
    query, key, value = _evened(inputs, uneven)
    with _on_device_of(query):
        bias = _bias(rpb, launch, scale, query)
        launch(query, key, value, out, lse, bias, seed, key_mask, numbers=(scale, *_keep(dropout_p)))
    return out, lse


def backward(
    qkv: list[Tensor],
    rpb: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    geometry: Geometry | MapBatch,
    scale: float,
    dropout_p: float,
    grads: list[Tensor | None],
    wants_bias: bool = True,
    preset: Preset | None = None,
) -> Tensor | None:
    """Writes the gradients of query, key and value into `grads`, and returns that of `rpb`.

    None among `grads` stands for one that is not wanted.
    """
    if _is_odd(qkv):
        inputs, fixed = _widened(qkv), (lse, _wide(grad_out), grad_lse, geometry, scale, dropout_p)
        wide = [None if x is None else _wide(torch.zeros_like(x)) for x in grads]
        grad_rpb = backward(inputs, rpb, seed, _wide(out), *fixed, wide, wants_bias, preset)
        for grad, found in zip(grads, wide, strict=True):
            if grad is not None and found is not None:
                grad.copy_(found[..., : grad.shape[-1]])
        return grad_rpb
    grad_q, grad_k, grad_v = outputs = _items(unpack_grads(grads), geometry)
    inputs = _items([*unpack(qkv), grad_out], geometry)
    written = [x if grad is None else grad for x, grad in zip(inputs, outputs, strict=False)]
    key_mask = _mask_bytes(qkv)
    wanted = (grad_q is not None, grad_k is not None, grad_v is not None, wants_bias and rpb is not None)
    given = (grad_lse is not None, seed is not None, key_mask is not None, wanted, preset)
    launches = prepare_backward(geometry, _places(inputs + written), *_kind(inputs[0], rpb), *given)
    query, key, value, grad_out = _evened(inputs, launches.uneven)
    numbers = (scale, *_keep(dropout_p))
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    partials = lse.new_empty(*launches.partials) if wanted[3] else None
    # Of each row: the log-sum-exp to base 2, and delta. Tiles of queries write them for tiles of keys.
    stats = lse.new_empty(*lse.shape, 2) if launches.queries else None
    with _on_device_of(query):
        tensors: tuple[Tensor | None, ...]
        for launch in launches.closed:
            tensors = (query, key, value, lse, grad_out, grad_lse, grad_q, grad_k, grad_v, partials)
            launch(*tensors, _bias(rpb, launch, scale, query), seed, key_mask, numbers=numbers)
        for launch in launches.queries:
            tensors = (query, key, value, out, lse, grad_out, grad_lse, stats, grad_q, partials)
            launch(*tensors, _bias(rpb, launch, scale, query), seed, key_mask, numbers=numbers)
        for launch in launches.keys:
            tensors = (query, key, value, grad_out, stats, grad_k, grad_v)
            launch(*tensors, _bias(rpb, launch, scale, query), seed, key_mask, numbers=numbers)
        return _fold(rpb, partials, launches)


def _is_odd(qkv: list[Tensor]) -> bool:
    """Whether loads of 16 bytes do not fit the channels: one by one their addresses take more registers than there are.

    Kernels that spill so much are slow, and ptxas 12.8 compiles some of them to something wrong.
    """
    return any([x.shape[-1] % ALIGNMENT > 0 for x in split_mask(qkv)[0]])


def _widened(qkv: list[Tensor]) -> list[Tensor]:
    """Copies with channels of zeros behind the others, which change nothing, and the mask."""
    tensors, key_mask = split_mask(qkv)
    return [*map(_wide, tensors), *([] if key_mask is None else [key_mask])]


def _wide(x: Tensor) -> Tensor:
    return pad(x, (0, -x.shape[-1] % ALIGNMENT))


def _mask_bytes(qkv: list[Tensor]) -> Tensor | None:
    """The key mask as the kernels read it, if there is one."""
    key_mask = split_mask(qkv)[1]
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


def _bias(rpb: Tensor | None, launch: Launch, scale: float, query: Tensor) -> Tensor | None:
    """Source of a launch's bias: the table of all pairs, over the scale, or `rpb` itself."""
    rpb = None if rpb is None else rpb.contiguous()
    if launch.table is None:
        return rpb
    table = query.new_empty(*launch.table.shape, dtype=torch.float32)
    launch.table(rpb, table, numbers=(scale,))
    return table


def _fold(rpb: Tensor | None, partials: Tensor | None, launches: Backward) -> Tensor | None:
    """The bias gradient from that of every program and pair."""
    if rpb is None or partials is None or launches.folds is None:
        return None
    over_programs, over_pairs = launches.folds
    sums = partials.new_empty(*over_programs.shape)
    grad = torch.empty_like(rpb, memory_format=torch.contiguous_format)
    over_programs(partials, sums)
    over_pairs(sums, grad)
    return grad


def _items(tensors: list[Any], geometry: Geometry | MapBatch) -> list[Any]:
    """Tensors, or None, as the kernels see them: maps of different sizes together are one batch item."""
    if not isinstance(geometry, MapBatch):
        return tensors
    return [None if x is None else x.flatten(0, -3).unsqueeze(0) for x in tensors]


def _evened(tensors: list[Tensor], uneven: tuple[int, ...]) -> list[Tensor]:
    """Tensors, and contiguous copies of the uneven ones."""
    return [x.contiguous() if i in uneven else x for i, x in enumerate(tensors)] if uneven else tensors


def _places(tensors: list[Tensor]) -> tuple[Place, ...]:
    return tuple([(x.shape, x.stride()) for x in tensors])


def _kind(query: Tensor, rpb: Tensor | None) -> tuple[torch.dtype, torch.device, bool, torch.dtype | None]:
    """Everything else that launches depend on; whether float32 products may round is torch's switch."""
    dtype = query.dtype
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return dtype, query.device, tf32, None if rpb is None else rpb.dtype


def _keep(dropout_p: float) -> tuple[int, float]:
    """The first of the draws that are kept, and the factor that makes up for the dropped ones."""
    return threshold(dropout_p), 1 / (1 - dropout_p)


def _on_device_of(x: Tensor):
    """Makes a tensor's GPU the current one, for Triton launches there."""
    here = not x.is_cuda or x.get_device() == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(x.device)
