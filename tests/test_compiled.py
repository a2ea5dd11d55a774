"""The kernels as Triton compiles them for NVIDIA GPUs, run on the CPU by a machine for PTX, against float64."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, product

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
SAMPLES = sampling.samples(9, seed=7, max_tokens=60, borders=sampling.BORDERS)
CLOSED = Sample((14, 14), (7, 7), (2, 2), (1, 1), (False, False))
SLIDING = Sample((9, 10), (5, 5), (1, 1), (1, 1), (False, False))
RAGGED = Sample((15, 17), (3, 3), (2, 3), (1, 1), (False, False))
CAUSAL = Sample((150,), (9,), (1,), (1,), (True,))
LARGE = Sample((4, 6, 7), (3, 4, 5), (1, 1, 1), (2, 1, 3), (True, False, False))  # even, strided and causal
WIDE = Sample((13, 13), (11, 11), (1, 1), (1, 1), (False, False), ("wrap", "clip"))
GROUPED = {"heads": 4, "biased": False, "grouped": True}

# Every target runs every pass, and every feature on some of the geometries.
NARROW = [
    *product(TARGETS, (CLOSED, SLIDING), [{}]),
    *zip(TARGETS, (WIDE, RAGGED, CAUSAL), [{}] * 3, strict=True),
    *zip(TARGETS, [SLIDING] * 3, ({"dims": (24, 40)}, {"dims": (64, 64)}, {"dims": (128, 16)}), strict=True),
    ("sm_100", SLIDING, {"dims": (64, 64)}),  # its memory in other shapes
    *zip(TARGETS, (LARGE, SLIDING, CLOSED), (GROUPED, GROUPED, GROUPED | {"dropout_p": 0.3}), strict=True),
    *zip(TARGETS, (CLOSED, SLIDING), [{"batch": 1, "dropout_p": 0.3}] * 2, strict=False),
]


@pytest.fixture
def gpu(request: pytest.FixtureRequest, poisoned: None) -> Iterator[GPU]:
    with pretended(find_target(request.param)) as gpu:
        yield gpu


@pytest.mark.parametrize(("gpu", "sample"), [*zip(cycle(TARGETS), SAMPLES, strict=False)], indirect=["gpu"], ids=str)
def test_random_geometries(gpu: GPU, sample: Sample) -> None:
    check(make_case(sample, random.Random(0), heads=2, dims=(12, 8), biased=True, scale=0.7))


@pytest.mark.parametrize(("gpu", "packed"), [("sm_80", True), ("sm_90", False)], indirect=["gpu"])
def test_maps_of_different_sizes(gpu: GPU, packed: bool) -> None:
    case = make_map_case(RAGGED, random.Random(5), 2)
    case.check(case.run("triton", packed), case.alone("reference", torch.float64), 1e-5)


@pytest.mark.parametrize(("gpu", "sample", "options"), NARROW, indirect=["gpu"], ids=str)
def test_low_precision(gpu: GPU, sample: Sample, options: dict) -> None:
    options = {"heads": 2, "dims": (32, 32), "batch": 2, "biased": True} | options
    grouped = options.pop("grouped", False)
    case = make_case(sample, random.Random(1), **options)
    case.leaves[1:3] = [x[..., :2, :] if grouped else x for x in case.leaves[1:3]]
    check_narrow(case, torch.float16 if sample is RAGGED else torch.bfloat16)
    if sample is CLOSED:
        assert TARGETS[gpu.target.name] in {i.operation for each in gpu.launched for i in each.code}


@pytest.mark.parametrize(
    ("gpu", "sample", "dim", "tf32"),
    # Key masks, and products of three.
    [
        ("sm_80", SLIDING, 16, False),
        ("sm_90", CLOSED, 16, False),
        ("sm_90", SLIDING, 128, False),  # the next loads on their way
        ("sm_80", SLIDING, 32, True),
        ("sm_100", CLOSED, 32, True),
    ],
    indirect=["gpu"],
    ids=str,
)
def test_float32(gpu: GPU, sample: Sample, dim: int, tf32: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        check(make_case(sample, random.Random(1), heads=2, dims=(dim, dim), batch=2, biased=True, masked=not tf32))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert tf32 == ("mma" in {i.operation for each in gpu.launched for i in each.code})


@pytest.mark.slow
@pytest.mark.parametrize("layer", layers_of("dinat_mini@224", batch=2), ids=lambda layer: layer.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target", TARGETS)
def test_every_layer(target: str, dtype: torch.dtype, layer: Layer) -> None:
    """On a GPU so small that its programs walk as many tiles and images as a large one's do in a large batch."""
    with pretended(replace(find_target(target), multiprocessors=2)):
        assert LayerRun(layer, dtype, torch.device("cpu"), attention, lambda _: {}).check(None) is None
