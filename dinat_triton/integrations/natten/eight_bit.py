"""8-bit floats, which NATTEN's kernels for Blackwell take: computed in half precision, whose values include theirs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from dinat_triton.integrations.natten.arguments import Refused

EIGHT_BIT = {torch.float8_e4m3fn, torch.float8_e5m2}


def takes_eight_bit(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an attention take 8-bit floats too: forwards only, as NATTEN does, with an output of their dtype."""

    @wraps(attend)
    def attend_any(*args: Any, **keywords: Any) -> Any:
        tensors = [x for x in (*args, *keywords.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        dtypes = {x.dtype for x in tensors}
        if not dtypes & EIGHT_BIT:
            return attend(*args, **keywords)
        if len(dtypes) > 1:
            raise Refused(f"tensors must be of one dtype, got {', '.join(sorted(map(str, dtypes)))}")
        if any(x.requires_grad for x in tensors):
            raise Refused("tensors of 8-bit floats have no gradient: none may have requires_grad")
        result = attend(*map(_half, args), **{name: _half(x) for name, x in keywords.items()})
        out, *lse = result if isinstance(result, tuple) else (result,)
        out = out.to(*dtypes)
        return (out, *lse) if lse else out

    return attend_any


def _half(x: Any) -> Any:
    return x.half() if isinstance(x, Tensor) and x.dtype in EIGHT_BIT else x
