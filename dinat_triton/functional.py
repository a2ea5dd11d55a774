"""Neighborhood attention as functions: `na1d`, `na2d`, `na3d`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from dinat_triton import ops
from dinat_triton.checks import check_rank
from dinat_triton.dispatch import current_backend
from dinat_triton.geometry import BORDERS, SHIFT, broadcast_bools, broadcast_borders, broadcast_ints
from dinat_triton.map_batch import flat_sizes

Ints = int | Sequence[int]
Bools = bool | Sequence[bool]
Borders = str | Sequence[str]


def window_of(
    rank: int, kernel_size: Ints, stride: Ints, dilation: Ints, is_causal: Bools, border: Borders = SHIFT
) -> list[int]:
    """The ops' flat form of a window: every axis' kernel_size, stride, dilation, is_causal, and its border's number."""
    return [
        *broadcast_ints("kernel_size", kernel_size, rank),
        *broadcast_ints("stride", stride, rank),
        *broadcast_ints("dilation", dilation, rank),
        *map(int, broadcast_bools("is_causal", is_causal, rank)),
        *((0,) * rank if border == SHIFT else map(BORDERS.index, broadcast_borders(border, rank))),
    ]


def call_na(
    qkv: list[Tensor],
    window: list[int],
    rpb: Tensor | None,
    scale: float | None,
    dropout_p: float,
    return_lse: bool,
    backend: str | None,
    sizes: list[int] | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The op `na`: one node in a compiled or traced graph; in eager mode called without torch's dispatcher between."""
    na = torch.ops.dinat_triton.na if torch.compiler.is_compiling() or torch._C._is_tracing() else ops.na
    backend = current_backend() if backend is None else backend
    return na(qkv, window, rpb, scale, dropout_p, return_lse, backend, sizes, key_mask)


def _is_sharded(*tensors: Tensor | None) -> bool:
    """Whether any is a DTensor, asked without importing what defines them."""
    return any([type(x) is not Tensor and hasattr(x, "device_mesh") for x in tensors])


def _public(rank: int):
    """The public function of a rank. All three are this one."""

    def na(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Ints,
        *,
        stride: Ints = 1,
        dilation: Ints = 1,
        is_causal: Bools = False,
        border: Borders = SHIFT,
        rpb: Tensor | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        return_lse: bool = False,
        backend: str | None = None,
        sizes: Sequence[Ints] | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if has_torch_function(tensors := (query, key, value, rpb, key_mask)):
            options: dict[str, Any] = {"stride": stride, "dilation": dilation, "is_causal": is_causal, "border": border}
            options |= {"rpb": rpb, "scale": scale, "dropout_p": dropout_p}
            options |= {"return_lse": return_lse, "backend": backend, "sizes": sizes, "key_mask": key_mask}
            return handle_torch_function(na, tensors, query, key, value, kernel_size, **options)
        if _is_sharded(*tensors):
            from dinat_triton.distributed import dtensors

            if sizes is not None:
                raise ValueError(f"sizes must be None for DTensors, whose maps are all alike, got {sizes}")
            maps, windows = (query, key, value, key_mask), (kernel_size, stride, dilation, is_causal, border)
            rest = {"scale": scale, "dropout_p": dropout_p, "return_lse": return_lse, "backend": backend}
            out, lse = dtensors.na(rank, *maps, *windows, rpb=rpb, **rest)
            return out if lse is None else (out, lse)
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_rank(name, x, rank, sizes is not None)
        window = window_of(rank, kernel_size, stride, dilation, is_causal, border)
        flat = None if sizes is None else flat_sizes(sizes, rank)
        out, lse = call_na([query, key, value], window, rpb, scale, dropout_p, return_lse, backend, flat, key_mask)
        return (out, lse) if return_lse else out

    axes = ("length",) if rank == 1 else ("depth", "height", "width")[3 - rank :]
    na.__name__ = na.__qualname__ = f"na{rank}d"
    na.__doc__ = f"""{rank}-D neighborhood attention: every query attends to the window of keys around it.

    `softmax(scale * query . key + rpb) . value` over each query's window. Integers, booleans and names broadcast over
    the axes.

    Args:
        query: `[batch, {", ".join(axes)}, heads, dim]`, any strides.
        key: As query; may have fewer heads, each shared by a run of query heads.
        value: As key; may have another dim.
        kernel_size: Keys in a window along each axis.
        stride: Queries that share one window.
        dilation: Distance between neighboring keys of a window; `kernel_size * dilation` must fit the map, unless
            its border clips.
        is_causal: Whether a query sees only keys at or before its own position on that axis.
        border: What becomes of windows that would pass an end of the map. "shift" moves them inwards and keeps their
            size, "clip" cuts them, "wrap" has them go on at the other end; that axis' dilation must divide its length.
        rpb: Relative positional bias `[heads, 2 * kernel_size - 1 per axis]`, in units of dilation, not scaled. -inf
            hides a key; a query that sees none gets zeros, and a log-sum-exp of -inf.
        scale: Of the dot products; `dim ** -0.5` by default.
        dropout_p: Probability of dropping an attention probability. Pass 0 when evaluating.
        return_lse: Whether to return the log-sum-exp of the logits too.
        backend: "triton", "tiled" or "reference"; by default the `use_backend` choice, or else the best that can run.
        sizes: One shape per map, for a batch of maps of different sizes: each in the top left corner of its batch item,
            or, with tensors `[tokens of all maps, heads, dim]`, one after the other. Every map is attended to as if it
            were alone; padding is never read, and zero in outputs and gradients.
        key_mask: `[batch, {", ".join(axes)}]`, True where the key may be seen. What the hidden keys and values hold
            reaches nothing; a query that sees no key gets zeros, and a log-sum-exp of -inf.

    Returns:
        `[batch, {", ".join(axes)}, heads, value dim]`, and with `return_lse` the log-sum-exp without its last axis.
    """
    return na


na1d = _public(1)
na2d = _public(2)
na3d = _public(3)
