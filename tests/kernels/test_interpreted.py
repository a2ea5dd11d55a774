"""The Triton kernels under the interpreter, against the reference in float64: outputs, log-sum-exps, every gradient.

Needs TRITON_INTERPRET=1 before Triton is imported; `make test` runs this folder in a process of its own.
"""

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

import dinat_triton as dt
from dinat_triton.kernels import prepare, schedule, support
from dinat_triton.kernels.configs import Architecture, Config
from dinat_triton.passes import Pass
from tests.oracles.cases import check, check_narrow, check_wanted, hide, make_case
from tests.oracles.gpu import forget_launches
from tests.oracles.map_batches import make_map_case
from tests.oracles.sampling import BORDERS, Sample, samples

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="set TRITON_INTERPRET=1"),
    # Empty slots of a tile compute (-inf) - (-inf), which nobody reads.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

CHUNKS = 4
SAMPLES = samples(40, seed=14, max_tokens=40, borders=BORDERS)
MAPS = samples(8, seed=54, max_tokens=40, min_kernel=2, borders=BORDERS)


def square(shape: tuple[int, ...], kernel: int, dilation: int = 1, causal: bool = False) -> Sample:
    rank = len(shape)
    return Sample(shape, (kernel,) * rank, (dilation,) * rank, (1,) * rank, (False,) * (rank - 1) + (causal,))


CLOSED = square((8, 8), 4, 2)  # tiles of 16
MANY_CHUNKS = square((9, 8), 5)  # and every kind of border
FEW_CHUNKS = Sample((7, 6), (4, 3), (1, 1), (1, 1), (False, False))
RAGGED = Sample((11, 13), (3, 3), (2, 3), (1, 1), (False, False))  # residue classes of several lengths
PARTIAL = square((90,), 9, causal=True)  # tiles, and spans of T + k - 1
LONG = square((64,), 20)  # in low precision, tiles with more windows than a word has bits
STRIDED = Sample((13, 11), (5, 6), (1, 1), (5, 6), (True, False))  # by more queries than a tile holds


@pytest.fixture(autouse=True, scope="module")
def _language_patched_once() -> Iterator[None]:
    """Not at every call of a helper, which takes the interpreter a third of its time."""
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope())
        yield
    scope.restore()


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_geometries(chunk: int, poisoned: None) -> None:
    rng = random.Random(chunk)
    for sample in SAMPLES[chunk::CHUNKS]:
        check(make_case(sample, rng, scale=rng.choice([None, 0.7])))


@pytest.mark.parametrize(
    ("sample", "options"),
    [
        *((sample, {}) for sample in (CLOSED, MANY_CHUNKS, RAGGED, PARTIAL, STRIDED)),
        # Between one and two kernels long, a key at the border is seen from everywhere.
        *((square((length,), 7), {"heads": 1}) for length in range(7, 16, 2)),
        *((square((9,), 3, 2), {"dims": dims}) for dims in [(24, 40), (80, 16), (96, 96), (256, 8)]),
        *((sample, {"batch": 2, "masked": True, "dropout_p": 0.2}) for sample in (CLOSED, FEW_CHUNKS, PARTIAL)),
        *((sample, {"batch": 2, "masked": True, "biased": False}) for sample in (CLOSED, FEW_CHUNKS, PARTIAL)),
    ],
    ids=str,
)
def test_problems(sample: Sample, options: dict[str, Any], poisoned: None) -> None:
    check(make_case(sample, random.Random(0), **({"heads": 2, "biased": True} | options)))


@pytest.mark.parametrize("sample", [CLOSED, FEW_CHUNKS, PARTIAL], ids=str)
def test_queries_that_see_nothing_and_gradients_that_are_wanted_alone(sample: Sample, poisoned: None) -> None:
    case = make_case(sample, random.Random(0), heads=2, batch=1, biased=True, dropout_p=0.2)
    if sample is not PARTIAL:
        check_wanted(case, "triton")
    hide(case)
    exact = case.run("reference", torch.float64)
    case.leaves[3][1].clamp_(min=torch.finfo(torch.float32).min)  # hides a key as -inf does
    for name, value in case.run("triton", torch.float32).items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sample", [CLOSED, MANY_CHUNKS, LONG], ids=str)
def test_low_precision_is_no_worse_than_twice_eager(dtype: torch.dtype, sample: Sample) -> None:
    check_narrow(make_case(sample, random.Random(1), heads=2, dims=(16, 16), biased=True), dtype)


@pytest.mark.parametrize("sample", MAPS, ids=str)
def test_every_map_of_a_batch_is_attended_to_as_if_it_were_alone(sample: Sample, poisoned: None) -> None:
    case, packed = make_map_case(sample, random.Random(str(sample)), 2), sample in MAPS[::2]
    found = case.run("triton", packed)
    case.check(found, case.alone("reference", torch.float64), 1e-5)
    if sample in MAPS[:2]:
        case.check(found, case.alone("triton"))


@pytest.mark.parametrize("dilation", [1, 3])
def test_packed_inputs(dilation: int) -> None:
    """Read in place, and the gradient is one packed tensor."""
    qkv, rpb = torch.randn(2, 9, 9, 3, 2, 8, requires_grad=True), torch.randn(2, 5, 5, requires_grad=True)
    window = [3, 3, 1, 1, dilation, dilation, 0, 0, 0, 0]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        out, _ = torch.ops.dinat_triton.na(tensors, window, rpb, backend="triton")
        return [out, *torch.autograd.grad(out.square().sum(), [qkv, rpb])]

    packed, apart = run([qkv]), run([x.contiguous() for x in qkv.unbind(3)])
    assert all(map(torch.equal, packed, apart))
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


@pytest.fixture
def forget() -> Iterator[None]:
    forget_launches()
    yield
    forget_launches()


def test_a_large_batch_is_split_and_a_small_one_walks_tiles(monkeypatch: pytest.MonkeyPatch, forget: None) -> None:
    """However work is shared out among programs, the result is the same."""
    case, grids = make_case(square((6, 8), 3, 2), random.Random(5), heads=2, batch=3, biased=True), set()
    for programs in (1, 6, 1000):
        forget_launches()
        config = Config(programs=programs)
        monkeypatch.setattr(schedule, "choose_config", lambda *_, c=config: c)
        check(case)
        sizes = (dt.Geometry((6, 8), (3,), (2,)), 3, 2, 2, 8, 8)
        problem = schedule.problem_of(*sizes, torch.float32, torch.device("cpu"))
        grids.update(schedule.schedule_of(problem, pass_).grid for pass_ in (Pass.FORWARD, Pass.CLOSED_BACKWARD))
    assert len(grids) > 2


@pytest.mark.parametrize("dilation", [1, 2])
def test_wide_addresses(dilation: int, monkeypatch: pytest.MonkeyPatch, forget: None) -> None:
    """What inputs beyond 2**31 elements take: token addresses in 64 bits."""
    monkeypatch.setattr(prepare, "MOST_NARROW", 0)
    sample = square((6, 7), 3, dilation, causal=True)
    check(make_case(sample, random.Random(6), heads=2, batch=2, biased=True, dropout_p=0.2))


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
    assert dt.na1d(x.half(), x.half(), x.half(), 3, backend="triton").equal(x.half())


def test_an_empty_batch() -> None:
    x = torch.ones(0, 4, 1, 8, requires_grad=True)
    out = dt.na1d(x, x, x, 3, backend="triton")
    out.sum().backward()
    assert out.shape == x.shape
