"""Models on images cut over processes against one process with the whole image."""

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
from tests.test_sharded_maps import in_a_group

SMALL = {"embed_dim": 16, "depths": (2, 1, 1), "num_heads": (2, 2, 4), "num_classes": 3, "kernel_size": 3}


def model(name: str, **options) -> nn.Module:
    torch.manual_seed(1)
    made = timm.create_model(name, **options).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def cut(image: Tensor, mesh: DeviceMesh) -> DTensor:
    return distribute_tensor(image, mesh, [Shard(2 + dim) for dim in range(mesh.ndim)], src_data_rank=None)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def step(module: nn.Module, image: Tensor, seed: int = 5) -> dict[str, Tensor]:
    """Logits and all gradients, as a whole."""
    image = image.detach().requires_grad_()
    torch.manual_seed(seed)
    logits = module(image)
    logits.sin().sum().backward()
    gradients = [whole(parameter.grad) for parameter in module.parameters()]
    names = [name.removeprefix("module.") for name, _ in module.named_parameters()]
    return {"logits": logits.detach(), "image": whole(image.grad), **dict(zip(names, gradients, strict=True))}


def same(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert results.keys() == expected.keys()
    for name, value in results.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9, msg=f"{name}: {{}}".format)


def family() -> None:
    meshes = [init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))]
    isotropic = {"embed_dim": 32, "num_heads": (2, 2), "depth": 2, "patch_size": 8, "num_classes": 3}
    cases = [
        ("dinat_mini", SMALL | {"dilations": [[1, 4], 2, 1], "layer_scale": 0.5, "drop_path_rate": 0.4}, (72, 40)),
        ("nat_mini", SMALL | {"kernel_size": 5}, (44, 68)),  # the last map, 3 rows on 4 ranks, is smaller than a window
        ("dinat_s_tiny", SMALL | {"dilations": 2}, (61, 47)),
        ("dinat_isotropic_small", isotropic, (20, 50)),  # three rows of patches on 4 ranks
    ]
    for number, (name, options, size) in enumerate(cases):
        one = model(name, **options)
        image = torch.randn(2, 3, *size, dtype=torch.float64)
        expected = step(one, image)
        for mesh in meshes if number < 3 else meshes[:1]:
            sharded = dt.distributed.shard_map(model(name, **options), mesh)
            same(step(sharded, cut(image, mesh), seed=5 + dist.get_rank()), expected)


def composed() -> None:
    """Half of the images on each half of the ranks, with DDP and with FSDP2; recomputed, and a compiled part."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "map"))
    options = SMALL | {"dilations": [[1, 4], 2, 1], "drop_path_rate": 0.0}
    images = torch.randn(4, 3, 72, 40, dtype=torch.float64)
    expected = step(model("dinat_mini", **options), images)
    own = slice(2 * mesh.get_local_rank("data"), 2 * mesh.get_local_rank("data") + 2)
    # Both average over the halves.
    expected = {name: x[own] if name in ("logits", "image") else x / 2 for name, x in expected.items()}

    def sharded() -> nn.Module:
        made = dt.distributed.shard_map(model("dinat_mini", **options), mesh["map"])
        made.set_grad_checkpointing(True)
        return made

    part = cut(images[own], mesh["map"])
    same(step(DistributedDataParallel(sharded(), process_group=mesh.get_group("data")), part), expected)
    fully = sharded()
    fully.levels[2].blocks[0].mlp.compile(backend="aot_eager")
    for level in fully.levels:
        for block in level.blocks:
            fully_shard(block, mesh=mesh["data"])
    same(step(fully_shard(fully, mesh=mesh["data"]), part), expected)


def compiled() -> None:
    """All that lies between exchanges, in graphs; and in bfloat16, recomputed in the backward."""
    mesh = init_device_mesh("cpu", (2,))
    options = SMALL | {"depths": (2, 1), "num_heads": (2, 2), "dilations": [[1, 4], 1], "drop_path_rate": 0.0}
    image = torch.randn(2, 3, 44, 36, dtype=torch.float64)
    expected = step(model("dinat_mini", **options), image)
    graphs = CompileCounterWithBackend("eager")
    whole_model = dt.distributed.shard_map(model("dinat_mini", **options), mesh)
    whole_model.compile(backend=graphs)
    same(step(whole_model, cut(image, mesh)), expected)
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
        sharded = dt.distributed.shard_map(model("dinat_mini", **options).to(dtype), mesh)
        for found, expected in zip(sharded(cut(image.to(dtype), mesh)), exact, strict=True):
            assert found.placements == (Shard(2),)
            assert (whole(found) - expected).norm() / expected.norm() < tolerance

    for message, x in (
        ("image must be a DTensor", image),
        ("image must be sharded over its first map axes", distribute_tensor(image, mesh, [Shard(3)])),
        ("image must be alike", DTensor.from_local(image[:, :, : 25 - dist.get_rank()], mesh, [Shard(2)])),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            sharded(x)
    with pytest.raises(TypeError, match=r"model is .*Conv2d"):
        dt.distributed.shard_map(nn.Conv2d(3, 4, 3), mesh)


def test_the_family_on_parts_of_images() -> None:
    in_a_group(4, family)


def test_data_parallelism_beside() -> None:
    in_a_group(4, composed)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_parts_between_exchanges_are_compiled() -> None:
    in_a_group(2, compiled)


def test_features_of_parts() -> None:
    in_a_group(3, features)
