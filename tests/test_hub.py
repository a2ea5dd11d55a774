"""The folder for the hub, loaded from where it lies, beside the package itself."""

from pathlib import Path

import pytest
import torch

import dinat_triton as dt
from dinat_triton.integrations import hub

kernels = pytest.importorskip("kernels")


def test_a_folder_is_loaded_as_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.write(tmp_path)
    monkeypatch.setenv("LOCAL_KERNELS", f"shi-labs/natten={tmp_path}")
    kernel = kernels.get_kernel("shi-labs/natten", version=1)  # as diffusers does
    assert Path(kernel.__file__).is_relative_to(tmp_path)

    qkv = [torch.randn(1, 5, 6, 7, 2, 8, requires_grad=True) for _ in range(3)]
    expected = dt.na3d(*qkv, (3, 3, 5), rpb=None, scale=0.5, backend="reference")
    grads = torch.autograd.grad(expected.square().sum(), qkv)
    for na3d in (kernel.na3d, torch.compile(kernel.na3d, fullgraph=True, backend="aot_eager")):
        out = na3d(*qkv, kernel_size=(3, 3, 5), scale=0.5, backend="hopper-fna")
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), qkv), grads)
    module = kernel.NeighborhoodAttention2D(16, 2, 3)
    assert module(torch.randn(1, 5, 6, 16)).shape == (1, 5, 6, 16)
