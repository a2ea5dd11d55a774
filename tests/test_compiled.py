"""The kernels as Triton compiles them for NVIDIA GPUs, run on the CPU by a machine for PTX, against float64."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
import triton

from dinat_triton.kernels import attention
from dinat_triton.layers import Layer, layers_of
from dinat_triton.offline.targets import find_target
from dinat_triton.tuner.layer_run import LayerRun
from tests.oracles import sampling
from tests.oracles.cases import check, check_narrow, make_case
from tests.oracles.gpu import GPU, pretended
from tests.oracles.map_batches import make_map_case
from tests.oracles.sampling import Sample

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the kernels are interpreted")

# The matrix instructions that float16 and bfloat16 take there.
TARGETS = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
SAMPLES = sampling.samples(12, seed=7, max_tokens=60, borders=sampling.BORDERS)
CLOSED = Sample((14, 14), (7, 7), (2, 2), (1, 1), (False, False))
SLIDING = Sample((9, 10), (5, 5), (1, 1), (1, 1), (False, False))
RAGGED = Sample((15, 17), (3, 3), (2, 3), (1, 1), (False, False))
CAUSAL = Sample((150,), (9,), (1,), (1,), (True,))
LARGE = Sample((4, 6, 7), (3, 4, 5), (1, 1, 1), (2, 1, 3), (True, False, False))  # even, strided and causal
WIDE = Sample((13, 13), (11, 11), (1, 1), (1, 1), (False, False), ("wrap", "clip"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(params=TARGETS)
def gpu(request: pytest.FixtureRequest, cache: Path, poisoned: None) -> Iterator[GPU]:
    with pretended(find_target(request.param), cache) as gpu:
        yield gpu


@pytest.mark.parametrize(("gpu", "sample"), [*zip(cycle(TARGETS), SAMPLES, strict=False)], indirect=["gpu"], ids=str)
def test_random_geometries(gpu: GPU, sample: Sample) -> None:
    check(make_case(sample, random.Random(0), heads=2, dims=(12, 8), biased=True, scale=0.7))


@pytest.mark.parametrize(("gpu", "packed"), [("sm_80", True), ("sm_90", False)], indirect=["gpu"])
def test_maps_of_different_sizes(gpu: GPU, packed: bool) -> None:
    case = make_map_case(RAGGED, random.Random(5), 2)
    case.check(case.run("triton", packed), case.alone("reference", torch.float64), 1e-5)


@pytest.mark.parametrize("sample", [CLOSED, SLIDING, RAGGED, CAUSAL, WIDE], ids=str)
def test_layers(gpu: GPU, sample: Sample) -> None:
    dtype = torch.float16 if sample is RAGGED else torch.bfloat16
    check_narrow(make_case(sample, random.Random(1), heads=2, dims=(32, 32), batch=2, biased=True), dtype)
    if sample is CLOSED:
        assert TARGETS[gpu.target.name] in {i.operation for each in gpu.launched for i in each.code}


@pytest.mark.parametrize("sample", [CLOSED, SLIDING], ids=str)
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"], indirect=True)
def test_key_masks(gpu: GPU, sample: Sample) -> None:
    check(make_case(sample, random.Random(1), heads=2, dims=(16, 16), batch=2, biased=True, masked=True))


@pytest.mark.parametrize("dims", [(64, 64), (24, 40), (128, 16)])
def test_head_dims(gpu: GPU, dims: tuple[int, int]) -> None:
    check_narrow(make_case(SLIDING, random.Random(2), heads=2, dims=dims), torch.bfloat16)


@pytest.fixture
def tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("sample", [CLOSED, SLIDING], ids=str)
def test_float32_in_three_products(gpu: GPU, sample: Sample, tf32: None) -> None:
    check(make_case(sample, random.Random(3), heads=2, dims=(32, 32)))
    assert "mma" in {i.operation for each in gpu.launched for i in each.code}


@pytest.mark.parametrize("sample", [CLOSED, SLIDING, LARGE], ids=str)
def test_without_a_bias_and_with_grouped_heads(gpu: GPU, sample: Sample) -> None:
    case = make_case(sample, random.Random(4), heads=4, dims=(32, 32), biased=False)
    case.leaves[1:] = [x[..., :2, :] for x in case.leaves[1:]]
    check_narrow(case, torch.bfloat16)


@pytest.mark.parametrize(
    ("gpu", "sample"), [("sm_80", CLOSED), ("sm_90", SLIDING), ("sm_100", CLOSED)], indirect=["gpu"], ids=str
)
def test_dropout(gpu: GPU, sample: Sample) -> None:
    check_narrow(make_case(sample, random.Random(5), heads=2, batch=1, dims=(32, 32), dropout_p=0.3), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("layer", layers_of("dinat_mini@224", batch=2), ids=lambda layer: layer.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target", TARGETS)
def test_every_layer(target: str, dtype: torch.dtype, layer: Layer, cache: Path) -> None:
    """On a GPU so small that its programs walk as many tiles and images as a large one's do in a large batch."""
    with pretended(replace(find_target(target), multiprocessors=2), cache):
        assert LayerRun(layer, dtype, torch.device("cpu"), attention, lambda _: {}).check(None) is None
