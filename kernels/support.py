"""Limits of the Triton kernels, said before launching them."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

MAX_DIM = 256
# The kernels divide the bias by the scale, in float32.
MIN_SCALE = 1e-30
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> str | None:
    """Why the kernels cannot run this call, or None if they can."""
    device = query.device
    if device.type != "cuda" and not (device.type == "cpu" and triton.knobs.runtime.interpret):
        return f"it runs on NVIDIA and AMD GPUs, and on the CPU with TRITON_INTERPRET=1; the tensors are on {device}"
    if query.dtype not in DTYPES:
        return f"it computes in float16, bfloat16 and float32, not {query.dtype}"
    for name, x in (("query and key", query), ("value", value)):
        if x.shape[-1] > MAX_DIM:
            return f"it takes head dims up to {MAX_DIM}, and {name} has {x.shape[-1]}"
    if scale is not None and scale < MIN_SCALE:
        return f"it needs a scale of at least {MIN_SCALE}, got {scale}"
    return None
