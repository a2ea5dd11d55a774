"""The Triton kernels under the interpreter, against the reference in float64: outputs, log-sum-exps, every gradient.

Needs TRITON_INTERPRET=1 before Triton is imported; `make test` runs this folder in a process of its own.
"""

import random

import pytest
import torch
import triton
from torch import Tensor

import dinat_triton as dt
from dinat_triton.kernels import support
from dinat_triton.kernels.configs import Architecture
from tests.oracles import sampling
from tests.oracles.cases import check, check_narrow, check_wanted, hide, make_case

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="set TRITON_INTERPRET=1"),
    # Empty slots of a tile compute (-inf) - (-inf), which nobody reads.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

CHUNKS = 6
SAMPLES = sampling.samples(60, seed=14, max_tokens=40, borders=sampling.BORDERS)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_geometries(chunk: int, poisoned: None) -> None:
    rng = random.Random(chunk)
    for sample in SAMPLES[chunk::CHUNKS]:
        check(make_case(sample, rng, scale=rng.choice([None, 0.7])))


@pytest.mark.parametrize("length", range(7, 16, 2))
def test_short_maps_where_all_queries_see_a_key(length: int, poisoned: None) -> None:
    """Between one and two kernels long, a key at the border is seen from everywhere."""
    check(make_case(sampling.Sample((length,), (7,), (1,), (1,), (False,)), random.Random(length), heads=1))


def test_a_stride_of_more_queries_than_a_tile_holds() -> None:
    check(make_case(sampling.Sample((13, 11), (5, 6), (1, 1), (5, 6), (True, False)), random.Random(1), biased=True))


CLOSED = sampling.Sample((8, 8), (4, 4), (2, 2), (1, 1), (False, False))  # tiles of 16
MANY_CHUNKS = sampling.Sample((9, 8), (5, 5), (1, 1), (1, 1), (False, False))  # and every kind of border
RAGGED = sampling.Sample((11, 13), (3, 3), (2, 3), (1, 1), (False, False))  # residue classes of several lengths
PARTIAL = sampling.Sample((90,), (9,), (1,), (1,), (True,))  # tiles, and spans of T + k - 1


@pytest.mark.parametrize("sample", [CLOSED, MANY_CHUNKS, RAGGED, PARTIAL], ids=str)
def test_layers(sample: sampling.Sample, poisoned: None) -> None:
    check(make_case(sample, random.Random(0), heads=2, biased=True))


@pytest.mark.parametrize("sample", [CLOSED, MANY_CHUNKS, PARTIAL], ids=str)
def test_queries_that_see_nothing(sample: sampling.Sample, poisoned: None) -> None:
    case = make_case(sample, random.Random(0), heads=2, batch=1, biased=True)
    hide(case)
    exact = case.run("reference", torch.float64)
    case.leaves[3][1].clamp_(min=torch.finfo(torch.float32).min)  # hides a key as -inf does
    for name, value in case.run("triton", torch.float32).items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sample", [CLOSED, MANY_CHUNKS], ids=str)
def test_gradients_that_are_wanted_alone(sample: sampling.Sample, poisoned: None) -> None:
    check_wanted(make_case(sample, random.Random(0), heads=2, batch=1, biased=True, dropout_p=0.2), "triton")


@pytest.mark.parametrize("sample", [CLOSED, MANY_CHUNKS, PARTIAL], ids=str)
def test_key_masks(sample: sampling.Sample, poisoned: None) -> None:
    for biased in (True, False):
        check(make_case(sample, random.Random(0), heads=2, batch=2, biased=biased, dropout_p=0.2 * biased, masked=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sample", [CLOSED, MANY_CHUNKS, PARTIAL], ids=str)
def test_low_precision_is_no_worse_than_twice_eager(dtype: torch.dtype, sample: sampling.Sample) -> None:
    """In tiles of 64: those of one dimension have more windows than a word has bits."""
    case = make_case(sample, random.Random(1), heads=2, dims=(16, 16), biased=True)
    check_narrow(case, dtype)


@pytest.mark.parametrize("dims", [(8, 8), (24, 40), (80, 16), (96, 96), (256, 8)])
def test_head_dims(dims: tuple[int, int]) -> None:
    check(make_case(sampling.Sample((9,), (3,), (2,), (1,), (False,)), random.Random(2), dims=dims))


@pytest.mark.parametrize("dilation", [1, 2])
def test_dropout_is_that_of_the_reference(dilation: int) -> None:
    sample = sampling.Sample((6, 8), (3, 3), (dilation, dilation), (1, 1), (False, False))
    check(make_case(sample, random.Random(4), heads=4, batch=2, dropout_p=0.3))


@pytest.mark.parametrize("dilation", [1, 3])
def test_packed_inputs(dilation: int) -> None:
    """Read in place, and the gradient is one packed tensor."""
    qkv, rpb = torch.randn(2, 9, 9, 3, 2, 8, requires_grad=True), torch.randn(2, 5, 5, requires_grad=True)
    window = [3, 3, 1, 1, dilation, dilation, 0, 0, 0, 0]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        out, _ = torch.ops.dinat_triton.na(tensors, window, rpb, backend="triton")
        return [out, *torch.autograd.grad(out.square().sum(), [qkv, rpb])]

    packed, apart = run([qkv]), run([x.contiguous() for x in qkv.unbind(3)])
    for a, b in zip(packed, apart, strict=True):
        assert torch.equal(a, b)
    assert packed[1].is_contiguous()


def test_strided_inputs_and_gradients() -> None:
    query, key, value = (x.requires_grad_() for x in torch.randn(3, 2, 2, 7, 5, 8).transpose(-1, -2).unbind())
    inputs = [x.movedim(1, -2) for x in (query, key, value)]  # heads first in memory, the last axis strided

    def run(backend: str) -> list[Tensor]:
        out = dt.na2d(*inputs, 3, backend=backend)
        grad = torch.linspace(-1, 1, out.numel()).view(out.shape[::-1]).permute(4, 3, 2, 1, 0)
        return [out, *torch.autograd.grad(out, [query, key, value], grad)]

    for a, b in zip(run("triton"), run("tiled"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_large_batch_is_split_and_a_small_one_walks_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """However work is shared out among programs, the result is the same."""
    from dinat_triton.kernels import configs, prepare, schedule

    sample = sampling.Sample((6, 8), (3, 3), (2, 2), (1, 1), (False, False))
    case = make_case(sample, random.Random(5), heads=2, batch=3, biased=True)
    grids = set()
    for programs in (1, 6, 1000):
        for cache in (prepare.prepare_forward, prepare.prepare_backward):
            cache.cache_clear()
        config = configs.Config(programs=programs)
        monkeypatch.setattr(schedule, "choose_config", lambda *_, c=config: c)
        check(case)
        sizes = (dt.Geometry((6, 8), (3,), (2,)), 3, 2, 2, 8, 8)
        problem = schedule.problem_of(*sizes, torch.float32, torch.device("cpu"))
        grids.update(schedule.schedule_of(problem, name).grid for name in ("forward", "closed_backward"))
    for cache in (prepare.prepare_forward, prepare.prepare_backward):
        cache.cache_clear()
    assert len(grids) > 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, "computes in float16, bfloat16 and float32, not torch.float64"),
        ({"dim": 264}, "takes head dims up to 256, and query and key has 264"),
        ({"device": "meta"}, "the tensors are on meta"),
        ({"scale": -1.0}, "needs a scale of at least 1e-30, got -1.0"),
        ({"scale": 1e-40}, "needs a scale of at least 1e-30, got 1e-40"),
    ],
)
def test_what_it_cannot_do_it_says_and_the_next_best_takes_over(changes: dict, message: str) -> None:
    options = {"scale": changes.pop("scale")} if "scale" in changes else {}
    x = torch.ones(1, 4, 1, changes.pop("dim", 8), **changes)
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run this call: .*{message}"):
        dt.na1d(x, x, x, 3, **options, backend="triton")
    assert dt.na1d(x, x, x, 3, **options).shape == x.shape


def test_head_dims_past_the_shared_memory_are_refused_before_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "architecture_of", lambda device: Architecture("sm_75", 64 << 10, 40))
    monkeypatch.setattr(support, "_most_channels", support._most_channels.__wrapped__)
    x = torch.ones(1, 4, 1, 256)
    message = "head dims up to 128 in torch.float32 with the shared memory of cpu, and query and key has 256"
    with pytest.raises(RuntimeError, match=message):
        dt.na1d(x, x, x, 3, backend="triton")
    assert dt.na1d(x, x, x, 3).equal(x)
    half = x.half()
    assert dt.na1d(half, half, half, 3, backend="triton").equal(half)


def test_wide_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What inputs beyond 2**31 elements take: token addresses in 64 bits."""
    from dinat_triton.kernels import prepare

    monkeypatch.setattr(prepare, "MOST_NARROW", 0)
    for cache in (prepare.prepare_forward, prepare.prepare_backward):
        cache.cache_clear()
    for dilation in (1, 2):
        sample = sampling.Sample((6, 7), (3, 3), (dilation, dilation), (1, 1), (False, True))
        check(make_case(sample, random.Random(6), heads=2, batch=2, biased=True, dropout_p=0.2))
    for cache in (prepare.prepare_forward, prepare.prepare_backward):
        cache.cache_clear()


def test_an_empty_batch() -> None:
    x = torch.ones(0, 4, 1, 8, requires_grad=True)
    out = dt.na1d(x, x, x, 3, backend="triton")
    out.sum().backward()
    assert out.shape == x.shape
