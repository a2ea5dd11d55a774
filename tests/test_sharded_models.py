"""Models on images cut over processes against one process with the whole image."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import dinat_triton as dt
from tests.test_parallel import whole
from tests.test_sharded_maps import in_a_group

SMALL = {"embed_dim": 16, "depths": (2, 1, 1), "num_heads": (2, 2, 4), "num_classes": 3, "kernel_size": 3}


def model(name: str, **options) -> nn.Module:
    torch.manual_seed(1)
    made = timm.create_model(name, **options).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def sharded(mesh: DeviceMesh, name: str = "dinat_mini", **options) -> nn.Module:
    return dt.distributed.shard_map(model(name, **options), mesh)


def cut(image: Tensor, mesh: DeviceMesh) -> DTensor:
    return distribute_tensor(image, mesh, [Shard(2 + dim) for dim in range(mesh.ndim)], src_data_rank=None)


def step(module: nn.Module, image: Tensor, seed: int = 5) -> dict[str, Tensor]:
    """Logits and all gradients, as a whole."""
    image = image.detach().requires_grad_()
    torch.manual_seed(seed)
    logits = module(image)
    logits.sin().sum().backward()
    gradients = {name.removeprefix("module."): whole(p.grad) for name, p in module.named_parameters()}
    return {"logits": logits.detach(), "image": whole(image.grad), **gradients}


def same(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-9)


def family() -> None:
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    isotropic = {"embed_dim": 32, "num_heads": (2, 2), "depth": 2, "patch_size": 8, "num_classes": 3}
    dropped = SMALL | {"dilations": [[1, 4], 2, 1], "layer_scale": 0.5, "drop_path_rate": 0.4}
    # On four ranks the last maps of the second, 3 rows, are smaller than a window, and those of the last as few.
    for name, options, size, meshes in (
        ("dinat_mini", dropped, (72, 40), (line, square)),
        ("nat_mini", SMALL | {"kernel_size": 5}, (44, 68), (line,)),
        ("dinat_s_tiny", SMALL | {"dilations": 2}, (61, 47), (square,)),
        ("dinat_isotropic_small", isotropic, (20, 50), (line,)),
    ):
        one = model(name, **options)
        image = torch.randn(2, 3, *size, dtype=torch.float64)
        expected = step(one, image)
        for mesh in meshes:
            same(step(sharded(mesh, name, **options), cut(image, mesh), seed=5 + dist.get_rank()), expected)


def composed() -> None:
    """Half of the images on each half of the ranks, with DDP and with FSDP2; recomputed, and a compiled part."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "map"))
    options = SMALL | {"depths": (1, 1, 1), "dilations": [4, 2, 1], "drop_path_rate": 0.0}
    images = torch.randn(4, 3, 72, 40, dtype=torch.float64)
    expected = step(model("dinat_mini", **options), images)
    own = slice(2 * mesh.get_local_rank("data"), 2 * mesh.get_local_rank("data") + 2)
    # Both average over the halves.
    expected = {name: x[own] if name in ("logits", "image") else x / 2 for name, x in expected.items()}
    simple, fully = (sharded(mesh["map"], **options) for _ in range(2))
    for made in (simple, fully):
        made.set_grad_checkpointing(True)
    part = cut(images[own], mesh["map"])
    same(step(DistributedDataParallel(simple, process_group=mesh.get_group("data")), part), expected)
    fully.levels[2].blocks[0].mlp.compile(backend="aot_eager")
    for level in fully.levels:
        fully_shard(level.blocks[0], mesh=mesh["data"])
    same(step(fully_shard(fully, mesh=mesh["data"]), part), expected)


def compiled() -> None:
    """All that lies between exchanges, in graphs; and in bfloat16, recomputed in the backward."""
    mesh = init_device_mesh("cpu", (2,))
    options = SMALL | {"depths": (1,), "num_heads": (2,), "dilations": 4, "drop_path_rate": 0.0}
    image = torch.randn(2, 3, 44, 36, dtype=torch.float64)
    expected = step(model("dinat_mini", **options), image)
    graphs, made = CompileCounterWithBackend("eager"), sharded(mesh, **options)
    made.compile(backend=graphs)
    same(step(made, cut(image, mesh)), expected)
    print("FRAMES", graphs.frame_count)
    assert graphs.frame_count > 5

    narrow = dt.distributed.shard_map(model("dinat_mini", **options).bfloat16(), mesh)
    narrow.set_grad_checkpointing(True)
    for name, value in step(narrow, cut(image.bfloat16(), mesh)).items():
        error = (value - expected[name]).norm() / expected[name].norm()
        assert error < 0.1, f"{name} is off by {error:.1e}"


def features() -> None:
    mesh = init_device_mesh("cpu", (3,))
    options = SMALL | {"features_only": True, "feature_norms": True, "output_fmt": "NCHW"}
    del options["num_classes"]
    image = torch.randn(1, 3, 75, 50, dtype=torch.float64)
    exact = model("dinat_mini", **options)(image)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.bfloat16, 2e-2)):
        part = dt.distributed.shard_map(model("dinat_mini", **options).to(dtype), mesh)
        for found, expected in zip(part(cut(image.to(dtype), mesh)), exact, strict=True):
            assert found.placements == (Shard(2),)
            assert (whole(found) - expected).norm() / expected.norm() < tolerance
    for message, x in (
        ("image must be a DTensor", image),
        ("image must be sharded over its first map axes", distribute_tensor(image, mesh, [Shard(3)])),
        ("image must be alike", DTensor.from_local(image[:, :, : 25 - dist.get_rank()], mesh, [Shard(2)])),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            part(x)
    with pytest.raises(TypeError, match=r"model is .*Conv2d"):
        dt.distributed.shard_map(nn.Conv2d(3, 4, 3), mesh)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("ranks", "program"), [(4, family), (4, composed), (2, compiled), (3, features)])
def test_models_on_parts_of_images(ranks: int, program: Callable[[], None]) -> None:
    in_a_group(ranks, program)
