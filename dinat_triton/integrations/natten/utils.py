"""`natten.utils`: what its users check arguments with."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from dinat_triton.geometry import broadcast_bools, broadcast_ints
from dinat_triton.integrations.natten.arguments import check_window, refusing

__all__ = [
    "check_all_args",
    "check_causal_arg",
    "check_dilation_arg",
    "check_input_size_arg",
    "check_kernel_size_arg",
    "check_stride_arg",
    "get_device_cc",
    "get_num_na_weights",
]


def check_all_args(na_dim: int, kernel_size: Any, *rest: Any) -> tuple[tuple[Any, ...], ...]:
    """One value per axis of kernel size, dilation and causality, or since 0.20 with the stride as the second."""
    if len(rest) == 3:
        stride, dilation, is_causal = rest
        return check_window(na_dim, kernel_size, stride, dilation, is_causal)
    dilation, is_causal = rest
    kernels, _, dilations, causal = check_window(na_dim, kernel_size, 1, dilation, is_causal)
    return kernels, dilations, causal


def check_kernel_size_arg(na_dim: int, kernel_size: Any) -> tuple[int, ...]:
    with refusing():
        return broadcast_ints("kernel_size", kernel_size, na_dim)


def check_input_size_arg(na_dim: int, input_size: Any) -> tuple[int, ...]:
    with refusing():
        return broadcast_ints("input_size", input_size, na_dim)


def check_stride_arg(na_dim: int, stride: Any) -> tuple[int, ...]:
    with refusing():
        return broadcast_ints("stride", 1 if stride is None else stride, na_dim)


def check_dilation_arg(na_dim: int, dilation: Any) -> tuple[int, ...]:
    with refusing():
        return broadcast_ints("dilation", 1 if dilation is None else dilation, na_dim)


def check_causal_arg(na_dim: int, is_causal: Any) -> tuple[bool, ...]:
    with refusing():
        return broadcast_bools("is_causal", False if is_causal is None else is_causal, na_dim)


def get_num_na_weights(kernel_size: tuple[int, ...]) -> int:
    """Keys in a window."""
    return prod(kernel_size)


def get_device_cc(device_index: Any = None) -> int:
    """Compute capability of a GPU, as 90 for 9.0; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor
