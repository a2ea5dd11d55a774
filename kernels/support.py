"""Limits of the Triton kernels, said before launching them."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from dinat_triton.kernels.configs import architecture_of, shared_memory

MAX_DIM = 256
# The kernels divide the bias by the scale, in float32.
MIN_SCALE = 1e-30
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> str | None:
    """Why the kernels cannot run this call, or None if they can."""
    if not (query.is_cuda or (query.is_cpu and triton.knobs.runtime.interpret)):
        where = "it runs on NVIDIA and AMD GPUs, and on the CPU with TRITON_INTERPRET=1"
        return f"{where}; the tensors are on {query.device}"
    if query.dtype not in DTYPES:
        return f"it computes in float16, bfloat16 and float32, not {query.dtype}"
    most = _most_channels(query.device, query.dtype)
    for name, x in (("query and key", query), ("value", value)):
        if x.shape[-1] > most:
            why = "" if most == MAX_DIM else f" in {query.dtype} with the shared memory of {query.device}"
            return f"it takes head dims up to {most}{why}, and {name} has {x.shape[-1]}"
    if scale is not None and scale < MIN_SCALE:
        return f"it needs a scale of at least {MIN_SCALE}, got {scale}"
    return None


@lru_cache
def _most_channels(device: torch.device, dtype: torch.dtype) -> int:
    """The largest head dim whose tiles fit the shared memory of a device."""
    architecture, most = architecture_of(device), MAX_DIM
    while shared_memory(most, torch.finfo(dtype).bits, architecture.is_amd) > architecture.shared_memory:
        most //= 2
    return most
