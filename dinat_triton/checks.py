"""Checks of what a call asks for. Every message names the argument, its value, and what would be right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dinat_triton.geometry import Geometry

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Checks what can be said of query, key and value without a geometry."""
    shape, dtype, device = query.shape, query.dtype, query.device
    alike = shape == key.shape == value.shape and dtype == key.dtype == value.dtype
    if alike and device == key.device == value.device and dtype in DTYPES and 0 not in shape:
        return  # what nearly every call asks, at the cost of a few comparisons
    named = {"query": query, "key": key, "value": value}
    for name, x in named.items():
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, got {x.device}")
        if x.ndim != query.ndim:
            raise ValueError(f"{name} must have as many axes as query, {query.ndim}, got shape {tuple(x.shape)}")
        if x.shape[:-2] != query.shape[:-2]:
            raise ValueError(
                f"{name} must have the batch and map of query, {tuple(query.shape[:-2])}, got {tuple(x.shape[:-2])}"
            )
        if x.shape[-1] == 0 or x.shape[-2] == 0:
            raise ValueError(f"{name} must have at least one head of at least one channel, got shape {tuple(x.shape)}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have the head dim of query, {query.shape[-1]}, got {key.shape[-1]}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value must have the heads of key, {key.shape[-2]}, got {value.shape[-2]}")
    if query.shape[-2] % key.shape[-2] != 0:
        raise ValueError(f"key's heads must divide query's {query.shape[-2]}, got {key.shape[-2]}")


def check_rpb(rpb: Tensor, query: Tensor, geometry: Geometry) -> None:
    expected = (query.shape[-2], *geometry.bias_shape)
    if rpb.shape != expected:
        raise ValueError(
            f"rpb must have shape [heads, 2 * kernel_size - 1 per axis] = {expected}, got {tuple(rpb.shape)}"
        )
    if rpb.dtype not in DTYPES:
        raise TypeError(f"rpb must be a floating tensor, got {rpb.dtype}")
    if rpb.device != query.device:
        raise ValueError(f"rpb must be on the device of query, {query.device}, got {rpb.device}")


def check_key_mask(key_mask: Tensor, lead: Sequence[int], device: torch.device) -> None:
    """Checks a mask of the keys of a batch of maps, `[batch, *map]`."""
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(f"key_mask must be a bool tensor, True where the key may be seen, got {got}")
    if tuple(key_mask.shape) != tuple(lead):
        raise ValueError(f"key_mask must have the batch and map of query, {tuple(lead)}, got {tuple(key_mask.shape)}")
    if key_mask.device != device:
        raise ValueError(f"key_mask must be on the device of query, {device}, got {key_mask.device}")


def check_scale(scale: float | None) -> None:
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale}")


def check_dropout(dropout_p: float) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")


def check_rank(name: str, x: Tensor, rank: int, has_sizes: bool = False) -> None:
    """Checks that a public function got tensors of its own rank; maps whose sizes are given may be packed."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim != rank + 3 and not (has_sizes and x.ndim == 3):
        axes = (
            ", ".join(("batch", *("depth", "height", "width")[3 - rank :], "heads", "dim"))
            if rank > 1
            else ("batch, length, heads, dim")
        )
        packed = " or [tokens of all maps, heads, dim]" if has_sizes else ""
        raise ValueError(f"{name} must be [{axes}]{packed}, got shape {tuple(x.shape)}")
