"""Tensor parallelism: two processes with half of the heads each against one process with all of them."""

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import dinat_triton as dt
from dinat_triton.parallel import HeadwiseParallel
from tests.processes import in_processes


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def results(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of everything that has one, each as a whole."""
    x = x.clone().requires_grad_()
    out = module(x)
    out.sin().sum().backward()
    return {"out": out.detach(), "x": x.grad, **{name: whole(p.grad) for name, p in module.named_parameters()}}


def agree(make: Callable[[], nn.Module], x: Tensor, mesh: DeviceMesh, plan: dict) -> None:
    expected, module = results(make(), x), make()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    parallelize_module(module, mesh, plan)
    torch.testing.assert_close(results(module, x), expected, rtol=1e-9, atol=1e-11)
    assert all(torch.equal(whole(value), state[name]) for name, value in module.state_dict().items())


def layer(rank: int = 2, **options) -> nn.Module:
    torch.manual_seed(1)
    kind = dt.NeighborhoodAttention1D if rank == 1 else dt.NeighborhoodAttention2D
    return kind(24, 4, 3, dilation=2, dtype=torch.float64, **options)


def model() -> nn.Module:
    torch.manual_seed(1)
    options = {"embed_dim": 32, "depths": (2, 1), "num_heads": (2, 4), "dilations": 2, "num_classes": 3}
    return timm.create_model("dinat_mini", **options).double()


def process() -> None:
    init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x = torch.randn(2, 9, 5, 24, dtype=torch.float64)  # the second axis is shorter than the span, so it is padded
    agree(partial(layer, rel_pos_bias=True), x, mesh, {"": HeadwiseParallel()})
    module = parallelize_module(layer(rel_pos_bias=True), mesh, {"": HeadwiseParallel()})
    with CommDebugMode() as communication:
        module(x)
    assert communication.get_total_counts() == 1  # the sum of what the heads give
    agree(partial(layer, rank=1, qkv_bias=False), x[:, :, 0], mesh, {"": HeadwiseParallel()})
    styles = {"attn": HeadwiseParallel(), "mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()}
    plan = {f"levels.*.blocks.*.{name}": style for name, style in styles.items()}
    agree(model, torch.randn(2, 3, 40, 48, dtype=torch.float64), mesh, plan)

    module = parallelize_module(layer(), mesh, {"qkv": ColwiseParallel(), "proj": RowwiseParallel()})
    module.num_heads //= 2  # as torch's tutorial says
    with pytest.raises(ValueError, match=r"qkv must have 3 \* 4 heads \* 6 channels, got 36; .*HeadwiseParallel"):
        module(x)
    with pytest.raises(ValueError, match="the mesh's 2 processes must divide the module's 3 heads"):
        parallelize_module(dt.NeighborhoodAttention2D(24, 3, 3), mesh, {"": HeadwiseParallel()})
    destroy_process_group()


@pytest.mark.skipif(torch.__version__ < "2.14", reason="HeadwiseParallel needs torch 2.14")
def test_two_processes_compute_what_one_does() -> None:
    in_processes(2, process)
