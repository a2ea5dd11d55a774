"""The Triton backend on a GPU: random problems and layers against float64, and everything that only a GPU can show."""

import gc
import os
import random
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dinat_triton as dt
from dinat_triton import dispatch
from dinat_triton.bench.layers import graphed
from dinat_triton.kernels import attention
from dinat_triton.layers import Layer, layers_of
from dinat_triton.tuner.layer_run import LayerRun
from tests.oracles import sampling
from tests.oracles.cases import NA, Case, check, check_narrow, make_case
from tests.oracles.sampling import Sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the kernels are interpreted"),
]
DEVICE = "cuda"
CHUNKS = 10
SAMPLES = sampling.samples(80, seed=5, max_tokens=400, borders=sampling.BORDERS)


@pytest.fixture(autouse=True)
def _exact() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def case(dilation: int = 1, shape: tuple[int, int] = (14, 15), dims: tuple[int, int] = (32, 32), **options) -> Case:
    """A layer of the models, small: dense tiles, or with dilation 2 tiles that are all of a residue class."""
    sample = Sample(shape, (7, 7), (dilation,) * 2, (1, 1), (False, False))
    options = {"heads": 2, "batch": 2, "biased": True} | options
    return make_case(sample, random.Random(0), DEVICE, dims=dims, **options)


def judge(case: Case, dtype: torch.dtype) -> None:
    check(case) if dtype == torch.float32 else check_narrow(case, dtype)


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_problems(chunk: int, dtype: torch.dtype, poisoned: None) -> None:
    rng = random.Random(chunk)
    for sample in SAMPLES[chunk::CHUNKS]:
        judge(make_case(sample, rng, DEVICE), dtype)


SMALL: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((14, 15), {"kernel_size": 7, "dilation": 2}),
    ((17, 9), {"kernel_size": 7}),
    ((37,), {"kernel_size": 5, "is_causal": True, "dropout_p": 0.2}),
    ((5, 6, 4), {"kernel_size": 3, "stride": 2}),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "window"), SMALL)
def test_every_kernel_once(shape: tuple[int, ...], window: dict[str, Any], dtype: torch.dtype) -> None:
    """On small ragged shapes: what compute-sanitizer watches, because it is soon done."""
    packed = draw(2, *shape, 3, 2, 24, dtype=dtype).requires_grad_()
    bias = draw(2, *[2 * window["kernel_size"] - 1] * len(shape), dtype=dtype).requires_grad_()
    out = NA[len(shape)](*packed.unbind(-3), rpb=bias, backend="triton", **window)
    grads = torch.autograd.grad(out.float().square().sum(), (packed, bias))
    assert all(x.isfinite().all() for x in (out, *grads))


DIMS = [(dim, torch.bfloat16) for dim in (8, 12, 16, 24, 40, 48, 64, 80, 128, 192, 256)]
DIMS += [(dim, torch.float32) for dim in (16, 64, 128, 256)] + [(32, torch.float16)]


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(("dim", "dtype"), DIMS)
def test_head_dims(dim: int, dtype: torch.dtype, dilation: int, poisoned: None) -> None:
    judge(case(dilation, dims=(dim, max(8, dim // 2))), dtype)


NAMES = ("dinat_mini@224", "dinat_mini@384", "dinat_mini@coco", "dinat_large@224")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", [layer for name in NAMES for layer in layers_of(name, batch=2)], ids=str)
def test_layers_of_the_models(layer: Layer, dtype: torch.dtype) -> None:
    assert LayerRun(layer, dtype, torch.device(DEVICE), attention, lambda _: {}).check(None) is None


@pytest.mark.parametrize("dilation", [1, 2])
def test_dropout_and_float32_products_as_torch_allows_them(dilation: int) -> None:
    for allow in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allow
        check(case(dilation))
        check(case(dilation, dropout_p=0.3))


@pytest.mark.parametrize("dilation", [1, 2])
def test_equal_runs_and_packed_tensors_give_equal_bits(dilation: int) -> None:
    problem = case(dilation, (28, 28), batch=32)
    first, again = (problem.run("triton", torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    packed = draw(2, 14, 14, 3, 2, 32).requires_grad_()
    window = [7, 7, 1, 1, dilation, dilation, 0, 0, 0, 0]
    out = torch.ops.dinat_triton.na([packed], window, None, None, 0.0, False, "triton")[0]
    together = torch.autograd.grad(out.float().sum(), packed)[0]
    parts = [x.detach().contiguous().requires_grad_() for x in packed.unbind(-3)]
    apart = torch.autograd.grad(dt.na2d(*parts, 7, dilation=dilation, backend="triton").float().sum(), parts)
    assert torch.equal(together, torch.stack(apart, -3))


def test_more_than_two_billion_elements() -> None:
    """The last images of a batch whose tensors need 64-bit addresses."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of memory")
    query = draw(172, 448, 448, 2, 32)
    assert query.numel() > 2**31
    out = dt.na2d(query, query, query, 7, dilation=64, backend="triton")
    alone = dt.na2d(query[-1:], query[-1:], query[-1:], 7, dilation=64, backend="triton")
    assert torch.equal(out[-1:], alone)


def test_a_training_step_is_the_references_and_compiles_without_a_graph_break() -> None:
    layers = [dt.NeighborhoodAttention2D(64, 2, dilation=d, rel_pos_bias=True) for d in (1, 2)]
    model, x = nn.Sequential(*layers).to(DEVICE), draw(2, 14, 15, 64, dtype=torch.float32)

    def step(call: nn.Module, x: Tensor, backend: str) -> list[Tensor]:
        with dt.use_backend(backend):
            return list(torch.autograd.grad(call(x).square().mean(), list(model.parameters())))

    torch.compiler.reset()
    eager, compiled = step(model, x, "triton"), step(torch.compile(model, fullgraph=True), x, "triton")
    for found, again, truth in zip(eager, compiled, step(model.double(), x.double(), "reference"), strict=True):
        for gradient in (found, again):
            assert (gradient.double() - truth).norm() < 1e-4 * truth.norm()


def test_autocast_computes_in_low_precision() -> None:
    *qkv, rpb = (x.float() for x in case().leaves)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = dt.na2d(*qkv, 7, rpb=rpb, backend="triton")
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, dt.na2d(*(x.bfloat16() for x in qkv), 7, rpb=rpb, backend="triton"))


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_cuda_graph_captures_forward_and_backward(dilation: int) -> None:
    window = [7, 7, 1, 1, dilation, dilation, 0, 0, 0, 0]
    packed, rpb = draw(4, 14, 14, 3, 2, 32), draw(2, 13, 13)
    scale = 32**-0.5

    def both() -> tuple[Tensor, ...]:
        out, lse = torch.ops.dinat_triton.fused([packed], rpb, None, window, scale, 0.0, True, "triton")
        grads, grad_rpb = torch.ops.dinat_triton.fused_backward(
            [packed], rpb, None, out, lse, out, None, window, scale, 0.0, "triton"
        )
        return out, grads[0], grad_rpb

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    packed.copy_(draw(*packed.shape))
    graph.replay()
    for found, expected in zip(captured, both(), strict=True):
        assert torch.equal(found, expected)


def test_a_graph_keeps_what_it_reads() -> None:
    model, x = nn.Linear(16, 16).to(DEVICE), draw(4, 16, dtype=torch.float32)
    still = weakref.ref(model)
    calls = [partial(model, x)]
    replay = graphed(calls.pop)
    del model
    gc.collect()
    replay()
    assert still() is not None


def test_the_registered_op_passes_opcheck() -> None:
    packed, rpb = (draw(*shape, dtype=torch.float32).requires_grad_() for shape in ((1, 9, 9, 3, 2, 16), (2, 5, 5)))
    arguments = ([packed], rpb, None, [3, 3, 1, 1, 2, 2, 0, 0, 0, 0], 0.25, 0.0, True, "triton")
    torch.library.opcheck(torch.ops.dinat_triton.fused.default, arguments)


def test_it_runs_by_default_and_refuses_tensors_elsewhere() -> None:
    here, there = (torch.zeros(1, 8, 8, 1, 16, device=device) for device in (DEVICE, "cpu"))
    assert dispatch.resolve(None, here, here, here, None) == "triton"
    with pytest.raises((ValueError, RuntimeError), match=r"device|cpu|cuda"):
        dt.na2d(here, there, here, 3, backend="triton")
    with pytest.raises(RuntimeError, match="cannot run this call"):
        dt.na2d(there, there, there, 3, backend="triton")


@pytest.mark.parametrize("dilation", [1, 4])
def test_a_launch_that_is_kept_serves_other_tensors(dilation: int) -> None:
    """Other values, other addresses, aligned or not, dropout between them, another stream."""
    side = torch.cuda.Stream()
    for _ in range(2):
        shifted = case(dilation, (28, 28))
        check(shifted)
        shifted.leaves = [torch.cat([x.new_zeros(1), x.flatten()]).float()[1:].view(x.shape) for x in shifted.leaves]
        assert all(x.data_ptr() % 16 for x in shifted.leaves)
        check(shifted)
        check(case(dilation, (28, 28), dropout_p=0.25))
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            check(case(dilation, (28, 28)))
        torch.cuda.synchronize()


def test_memory_stays_near_the_tensors() -> None:
    """Nothing grows with tokens times window."""
    packed = draw(32, 56, 56, 3, 2, 32)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        torch.ops.dinat_triton.na([packed], [7, 7, 1, 1, 1, 1, 0, 0, 0, 0], None, None, 0.0, False, "triton")
    grown = torch.cuda.max_memory_allocated() - before
    assert grown < 0.6 * packed.numel() * packed.element_size() + (8 << 20)
