"""NATTEN's flex backend on the CPU: an outside reference for everything but the bias."""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from tests.oracles.sampling import Sample

MIN_KERNEL = 2
"""NATTEN refuses smaller kernels."""

HEAD_DIM = 8
"""The smallest head_dim that its flex backend takes (powers of two from here to 512)."""


@functools.cache
def available() -> str | None:
    """None if NATTEN can be asked, else the reason why not."""
    try:
        natten = importlib.import_module("natten")
    except ImportError as error:
        return f"NATTEN cannot be imported: {error}"
    if natten.__version__ != "0.21.7":
        return f"NATTEN is {natten.__version__}, the reference is 0.21.7"
    return None


def attention(query: Tensor, key: Tensor, value: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of fp32, fp16 or bf16 tensors laid out `[B, *spatial, H, D]`; forward only."""
    # The flag keeps dynamo from tracing every new geometry: the same eager operations run, in a tenth of the time.
    eager = mock.patch.object(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, create=True)
    with eager, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        out, lse = _function(sample)(query, key, value, return_lse=True, **sample.natten_kwargs())
    return out, lse


def _function(sample: Sample) -> Callable[..., Any]:
    if sample.rank == 1 and sample.kernel_size == sample.shape and any(sample.is_causal):
        # The public function hands this case to a plain attention that has no causal mask on the CPU.
        return importlib.import_module("natten.backends").flex_fna_generic
    public = getattr(importlib.import_module("natten"), f"na{sample.rank}d")
    return functools.partial(public, backend="flex-fna")
