"""Every kernel once on small ragged shapes: what compute-sanitizer watches, because it is soon done."""

import os
from typing import Any

import pytest
import torch

import dinat_triton as dt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the kernels are interpreted"),
]
CASES: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((14, 15), {"kernel_size": 7, "dilation": 2}),
    ((17, 9), {"kernel_size": 7}),
    ((37,), {"kernel_size": 5, "is_causal": True, "dropout_p": 0.2}),
    ((5, 6, 4), {"kernel_size": 3, "stride": 2}),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "window"), CASES)
def test_outputs_and_gradients_are_finite(shape: tuple[int, ...], window: dict[str, Any], dtype: torch.dtype) -> None:
    heads, rank = 2, len(shape)
    packed = torch.randn(2, *shape, 3, heads, 24, device="cuda", dtype=dtype, requires_grad=True)
    bias = torch.randn(heads, *[2 * window["kernel_size"] - 1] * rank, device="cuda", dtype=dtype, requires_grad=True)
    function = (dt.na1d, dt.na2d, dt.na3d)[rank - 1]
    out = function(*packed.unbind(-3), rpb=bias, backend="triton", **window)
    grads = torch.autograd.grad(out.float().square().sum(), (packed, bias))
    assert all(bool(x.isfinite().all()) for x in (out, *grads))
