"""The Triton backend on a GPU: random problems against float64, and everything that only a GPU can show."""

import math
import os

import pytest
import torch
from torch import Tensor, nn

import dinat_triton as dt
from dinat_triton import dispatch
from tests.oracles import sampling
from tests.oracles.cases import NA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the kernels are interpreted"),
]

DEVICE = "cuda"
CHUNKS = 10
SAMPLES = sampling.samples(80, seed=5, max_tokens=400)
NAMES = ("out", "lse", "grad_query", "grad_key", "grad_value", "grad_rpb")


@pytest.fixture(autouse=True)
def _exact() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def leaves_of(shape: tuple[int, ...], kernel: tuple[int, ...], heads: int = 2, kv_heads: int = 2, dim: int = 32,
              value_dim: int | None = None, batch: int = 2) -> list[Tensor]:  # fmt: skip
    value_dim = dim if value_dim is None else value_dim
    return [
        draw(batch, *shape, heads, dim),
        draw(batch, *shape, kv_heads, dim),
        draw(batch, *shape, kv_heads, value_dim),
        draw(heads, *(2 * k - 1 for k in kernel)),
    ]


def run(leaves: list[Tensor], backend: str, dtype: torch.dtype, **window) -> dict[str, Tensor]:
    """Outputs and every gradient."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in leaves]
    rank = leaves[0].dim() - 3
    torch.manual_seed(3)  # the same dropout everywhere
    out, lse = NA[rank](*leaves[:3], rpb=leaves[3], return_lse=True, backend=backend, **window)
    weights = torch.Generator(DEVICE).manual_seed(1)
    grads = [torch.randn(x.shape, generator=weights, device=DEVICE).to(x.dtype) for x in (out, lse)]
    found = torch.autograd.grad([out, lse], leaves, grads)
    return dict(zip(NAMES, (out.detach(), lse.detach(), *found), strict=True))


def error(found: Tensor, truth: Tensor) -> float:
    return (torch.linalg.vector_norm(found.double() - truth) / (torch.linalg.vector_norm(truth) + 1e-12)).item()


def assert_right(leaves: list[Tensor], dtype: torch.dtype, **window) -> None:
    """Every error is at most 2 eps of the dtype, with room for long sums in float32."""
    leaves = [x.to(dtype).double() for x in leaves]
    truth, found = run(leaves, "reference", torch.float64, **window), run(leaves, "triton", dtype, **window)
    for name, expected in truth.items():
        assert error(found[name], expected) <= max(2 * torch.finfo(dtype).eps, 1e-5), name


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_problems(chunk: int, dtype: torch.dtype, poisoned: None) -> None:
    for i, sample in enumerate(SAMPLES[chunk::CHUNKS]):
        kv_heads = 1 + i % 2
        leaves = leaves_of(sample.shape, sample.kernel_size, kv_heads * (1 + i % 3 // 2), kv_heads)
        assert_right(leaves, dtype, **sample.kwargs())


DIMS = [(dim, torch.bfloat16) for dim in (8, 16, 24, 48, 64, 80, 128, 192, 256)]
DIMS += [(dim, torch.float32) for dim in (16, 64, 128, 256)] + [(32, torch.float16)]


@pytest.mark.parametrize(("dim", "dtype"), DIMS)
def test_head_dims(dim: int, dtype: torch.dtype, poisoned: None) -> None:
    for dilation in (1, 2):
        leaves = leaves_of((14, 15), (7, 7), dim=dim, value_dim=max(8, dim // 2))
        assert_right(leaves, dtype, kernel_size=7, dilation=dilation)


@pytest.mark.parametrize("allow", [False, True])
def test_float32_products_follow_torch(allow: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allow
    try:
        assert_right(leaves_of((14, 14), (7, 7)), torch.float32, kernel_size=7)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("dilation", [1, 2])
def test_dropout_is_the_same_everywhere(dilation: int) -> None:
    leaves = leaves_of((14, 15), (7, 7))
    assert_right(leaves, torch.float32, kernel_size=7, dilation=dilation, dropout_p=0.3)


@pytest.mark.parametrize("dilation", [1, 2])
def test_equal_runs_give_equal_bits(dilation: int) -> None:
    leaves = leaves_of((28, 28), (7, 7), batch=32)
    first, again = (run(leaves, "triton", torch.bfloat16, kernel_size=7, dilation=dilation) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in NAMES)


def test_a_packed_projection_gets_a_packed_gradient() -> None:
    packed = draw(2, 14, 14, 3, 2, 32, dtype=torch.bfloat16).requires_grad_()
    out = torch.ops.dinat_triton.na([packed], [7, 7, 1, 1, 2, 2, 0, 0], None, None, 0.0, False, "triton")[0]
    together = torch.autograd.grad(out.float().sum(), packed)[0]
    parts = [x.detach().contiguous().requires_grad_() for x in packed.unbind(-3)]
    apart = torch.autograd.grad(dt.na2d(*parts, 7, dilation=2, backend="triton").float().sum(), parts)
    assert torch.equal(together, torch.stack(apart, -3))


def test_more_than_two_billion_elements() -> None:
    """The last images of a batch whose tensors need 64-bit addresses."""
    batch, shape, heads, dim = 172, (448, 448), 2, 32
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of memory")
    query = torch.randn(batch, *shape, heads, dim, device=DEVICE, dtype=torch.bfloat16)
    assert query.numel() > 2**31
    out = dt.na2d(query, query, query, 7, dilation=64, backend="triton")
    alone = dt.na2d(query[-1:], query[-1:], query[-1:], 7, dilation=64, backend="triton")
    assert torch.equal(out[-1:], alone)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            dt.NeighborhoodAttention2D(64, 2, dilation=d, rel_pos_bias=True) for d in (1, 2)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def step(model: nn.Module, x: Tensor, backend: str) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    with dt.use_backend(backend):
        loss = model(x).float().square().mean()
        loss.backward()
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_training_step_matches_the_reference() -> None:
    model = TwoLayers().to(DEVICE)
    x = draw(2, 14, 15, 64, dtype=torch.float32)
    found = step(model, x, "triton")
    truth = step(model.double(), x.double(), "reference")
    assert found.keys() == truth.keys()
    for name in truth:
        assert error(found[name], truth[name]) < 1e-4, name


def test_compiles_without_a_graph_break() -> None:
    model = TwoLayers().to(DEVICE)
    x = draw(2, 14, 15, 64, dtype=torch.float32)
    eager = step(model, x, "triton")
    model.zero_grad(set_to_none=True)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    with dt.use_backend("triton"):
        compiled(x).square().mean().backward()
    for name, p in model.named_parameters():
        assert error(p.grad, eager[name].double()) < 1e-4, name


def test_autocast_computes_in_low_precision() -> None:
    leaves = [x.float() for x in leaves_of((14, 15), (7, 7))]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = dt.na2d(*leaves[:3], 7, rpb=leaves[3], backend="triton")
    assert out.dtype == torch.bfloat16
    low = [x.bfloat16() for x in leaves[:3]]
    assert torch.equal(out, dt.na2d(*low, 7, rpb=leaves[3], backend="triton"))


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_cuda_graph_captures_forward_and_backward(dilation: int) -> None:
    window = [7, 7, 1, 1, dilation, dilation, 0, 0]
    packed, rpb = draw(4, 14, 14, 3, 2, 32, dtype=torch.bfloat16), draw(2, 13, 13, dtype=torch.bfloat16)
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
    packed.copy_(draw(*packed.shape, dtype=torch.bfloat16))
    graph.replay()
    for found, expected in zip(captured, both(), strict=True):
        assert torch.equal(found, expected)


def test_it_is_what_runs_by_default() -> None:
    x = draw(1, 8, 8, 1, 16, dtype=torch.bfloat16)
    assert dispatch.resolve(None, x, x, x, None) == "triton"


def test_the_registered_op_passes_opcheck() -> None:
    packed = draw(1, 9, 9, 3, 2, 16, dtype=torch.float32).requires_grad_()
    rpb = draw(2, 5, 5, dtype=torch.float32).requires_grad_()
    arguments = ([packed], rpb, None, [3, 3, 1, 1, 2, 2, 0, 0], 0.25, 0.0, True, "triton")
    torch.library.opcheck(torch.ops.dinat_triton.fused.default, arguments)


def test_tensors_elsewhere_are_refused() -> None:
    here, there = (torch.zeros(1, 8, 8, 1, 16, device=device) for device in (DEVICE, "cpu"))
    with pytest.raises((ValueError, RuntimeError), match=r"device|cpu|cuda"):
        dt.na2d(here, there, here, 3, backend="triton")
    with pytest.raises(RuntimeError, match="cannot run this call"):
        dt.na2d(there, there, there, 3, backend="triton")


@pytest.mark.parametrize("dilation", [1, 4])
def test_a_launch_that_is_kept_serves_other_tensors(dilation: int) -> None:
    """Other values, other addresses, aligned or not, dropout between them, another stream."""
    window = {"kernel_size": 7, "dilation": dilation}
    shape, side = (28, 28), torch.cuda.Stream()

    def check(leaves: list[Tensor], dropout_p: float = 0.0) -> None:
        found, exact = (run(leaves, b, torch.float32, dropout_p=dropout_p, **window) for b in ("triton", "reference"))
        for name in NAMES:
            assert error(found[name], exact[name]) < 1e-4, name

    for _ in range(2):
        check(leaves_of(shape, (7, 7)))
        shifted = [torch.cat([x.new_zeros(1), x.float().flatten()])[1:].view(x.shape) for x in leaves_of(shape, (7, 7))]
        assert any(x.data_ptr() % 16 for x in shifted)
        check(shifted)
        check(leaves_of(shape, (7, 7)), dropout_p=0.25)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            check(leaves_of(shape, (7, 7)))
        torch.cuda.synchronize()


def test_memory_stays_near_the_tensors() -> None:
    """Nothing grows with tokens times window."""
    packed = draw(32, 56, 56, 3, 2, 32, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        torch.ops.dinat_triton.na([packed], [7, 7, 1, 1, 1, 1, 0, 0], None, None, 0.0, False, "triton")
    grown = torch.cuda.max_memory_allocated() - before
    assert grown < 0.6 * packed.numel() * packed.element_size() + (8 << 20)
    assert math.isfinite(grown)
