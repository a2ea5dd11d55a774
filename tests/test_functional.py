"""The public functions: what they compute under every option, and what they say to wrong input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import scaled_dot_product_attention

import dinat_triton as dt
from dinat_triton import tiled
from tests.oracles import sampling

BACKENDS = ("reference", "tiled")
NA = {1: dt.na1d, 2: dt.na2d, 3: dt.na3d}


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def case(
    rank: int = 2,
    kernel: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (9, 8, 7)[:rank]
    query = draw(batch, *shape, heads, 4, dtype=dtype)
    key = draw(batch, *shape, kv_heads, 4, dtype=dtype)
    value = draw(batch, *shape, kv_heads, 3, dtype=dtype)
    return query, key, value, draw(heads, *[2 * kernel - 1] * rank, dtype=dtype)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# What it computes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradients_against_finite_differences(backend: str, rank: int) -> None:
    shape = ((7,), (4, 5), (3, 3, 4))[rank - 1]
    query = draw(1, *shape, 2, 2).requires_grad_()
    key, value = draw(1, *shape, 1, 2).requires_grad_(), draw(1, *shape, 1, 3).requires_grad_()
    rpb = draw(2, *[3] * rank).requires_grad_()

    def f(query, key, value, rpb):
        causal = [True] + [False] * (rank - 1)
        return NA[rank](query, key, value, 2, stride=2, is_causal=causal, rpb=rpb, return_lse=True, backend=backend)

    assert gradcheck(f, (query, key, value, rpb))


def test_the_reference_is_twice_differentiable_and_has_forward_mode() -> None:
    inputs = tuple(x.requires_grad_() for x in (*(draw(1, 4, 4, 1, 2) for _ in range(3)), draw(1, 3, 3)))

    def f(query, key, value, rpb):
        return dt.na2d(query, key, value, 2, dilation=2, rpb=rpb, return_lse=True, backend="reference")

    assert gradgradcheck(f, inputs)
    assert gradcheck(f, inputs, check_forward_ad=True, check_backward_ad=False)


def test_the_tiled_backend_says_that_it_has_no_second_derivative() -> None:
    query = draw(1, 4, 4, 1, 2).requires_grad_()
    grad = torch.autograd.grad(dt.na2d(query, query, query, 3).sum(), query, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="'tiled' has no second derivatives; backend='reference' has"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kernel_that_covers_everything_is_full_attention(backend: str) -> None:
    query, key, value = (draw(2, 5, 5, 3, 4) for _ in range(3))
    heads_first = [x.flatten(1, 2).transpose(1, 2) for x in (query, key, value)]
    expected = scaled_dot_product_attention(*heads_first).transpose(1, 2).unflatten(1, (5, 5))
    close(dt.na2d(query, key, value, 5, backend=backend), expected)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), backend=st.sampled_from(BACKENDS))
def test_symmetries(seed: int, backend: str) -> None:
    """Permuting heads or batch permutes the result; shifting all values shifts it; a constant bias changes nothing."""
    sample = sampling.samples(1, seed=seed, ranks=(1 + seed % 3,), max_tokens=60)[0]
    attend, options = NA[sample.rank], sample.kwargs() | {"backend": backend}
    query, key, value = (draw(3, *sample.shape, 2, 4) for _ in range(3))
    rpb = draw(2, *(2 * k - 1 for k in sample.kernel_size))
    out = attend(query, key, value, rpb=rpb, **options)
    close(attend(*(x.flip(0) for x in (query, key, value)), rpb=rpb, **options), out.flip(0))
    close(attend(*(x.flip(-2) for x in (query, key, value)), rpb=rpb.flip(0), **options), out.flip(-2))
    close(attend(query, key, value + 2.5, rpb=rpb, **options), out + 2.5)
    close(attend(query, key, value, rpb=rpb + 7, **options), out)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), data=st.data())
def test_tiles_of_any_size_give_the_same_answer(seed: int, data: st.DataObject) -> None:
    sample = sampling.samples(1, seed=seed, ranks=(1 + seed % 3,), max_tokens=60)[0]
    tile = tuple(data.draw(st.integers(1, n)) for n in sample.shape)
    at_once = data.draw(st.sampled_from([1, 50, 1 << 20]))
    inputs = [draw(2, *sample.shape, 2, 4).requires_grad_() for _ in range(3)]
    rpb = draw(2, *(2 * k - 1 for k in sample.kernel_size)).requires_grad_()

    def run(backend: str) -> list[Tensor]:
        out = NA[sample.rank](*inputs, rpb=rpb, **sample.kwargs(), backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), [*inputs, rpb])]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "choose_tile", lambda *_: tile)
        patch.setattr(tiled, "SCORES_AT_ONCE", at_once)
        results = run("tiled")
    for a, b in zip(results, run("reference"), strict=True):
        close(a, b)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_backends_agree_on_everything_at_once(rank: int, poisoned: None) -> None:
    inputs = [x.requires_grad_() for x in case(rank)]

    def run(backend: str) -> list[Tensor]:
        torch.manual_seed(1)  # the same dropout
        *qkv, rpb = inputs
        out, lse = NA[rank](*qkv, 3, dilation=2, rpb=rpb, scale=0.3, dropout_p=0.4, return_lse=True, backend=backend)
        return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sin().sum(), inputs)]

    for a, b in zip(run("tiled"), run("reference"), strict=True):
        close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_drops_its_share_and_keeps_the_mean(backend: str) -> None:
    query = torch.zeros(4, 16, 16, 4, 2)
    value = torch.ones(4, 16, 16, 4, 2)
    out = dt.na2d(query, query, value, 5, dropout_p=0.3, backend=backend)
    assert out.mean().item() == pytest.approx(1, abs=0.01)
    assert out.std().item() == pytest.approx(math.sqrt(0.3 / 0.7 / 25), rel=0.1)
    torch.manual_seed(3)
    first = dt.na2d(query, query, value, 5, dropout_p=0.3, backend=backend)
    torch.manual_seed(3)
    torch.testing.assert_close(dt.na2d(query, query, value, 5, dropout_p=0.3, backend=backend), first, rtol=0, atol=0)
    assert not torch.equal(dt.na2d(query, query, value, 5, dropout_p=0.3, backend=backend), first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_stays_near_float64(backend: str, dtype: torch.dtype) -> None:
    """The bias gradient, a sum over all queries, too."""
    leaves = [draw(2, 24, 24, 2, 8) for _ in range(3)] + [draw(2, 5, 5)]
    leaves, weights = [x.to(dtype) for x in leaves], draw(2, 24, 24, 2, 8).to(dtype)

    def run(wide: torch.dtype, backend: str) -> list[Tensor]:
        *qkv, rpb = inputs = [x.to(wide).requires_grad_() for x in leaves]
        out, lse = dt.na2d(*qkv, 3, rpb=rpb, return_lse=True, backend=backend)
        return [out, lse, *torch.autograd.grad([out, lse], inputs, [weights.to(wide), lse.detach().cos()])]

    for found, exact in zip(run(dtype, backend), run(torch.float64, "reference"), strict=True):
        assert found.dtype == (torch.float32 if found.ndim == 4 else dtype)
        assert (found.double() - exact).norm() / exact.norm() < max(torch.finfo(found.dtype).eps, 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_packed_inputs_need_no_care(backend: str) -> None:
    packed = draw(2, 6, 7, 3, 4, 5)
    views = packed.unbind(3)
    expected = dt.na2d(*(x.contiguous() for x in views), 3, backend=backend)
    close(dt.na2d(*views, 3, backend=backend), expected)
    last_strided = [x.contiguous().transpose(-1, -2).contiguous().transpose(-1, -2) for x in views]
    assert last_strided[0].stride(-1) != 1
    close(dt.na2d(*last_strided, 3, backend=backend), expected)
    close(dt.na2d(*(x.flip(1).flip(1) for x in views), 3, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_an_empty_result_and_zero_bias_gradient(backend: str) -> None:
    query, key, value, rpb = (x.requires_grad_() for x in case(batch=0))
    out, lse = dt.na2d(query, key, value, 3, rpb=rpb, return_lse=True, backend=backend)
    assert out.shape == (0, 9, 8, 4, 3)
    assert lse.shape == (0, 9, 8, 4)
    (out.sum() + lse.sum()).backward()
    assert query.grad is not None
    assert query.grad.shape == query.shape
    assert rpb.grad is not None
    assert not rpb.grad.any()


def test_lse_is_natural_and_wide() -> None:
    query, key, value, _ = case(dtype=torch.bfloat16)
    for backend in BACKENDS:
        assert dt.na2d(query, key, value, 3, return_lse=True, backend=backend)[1].dtype == torch.float32
    lse = dt.na2d(
        torch.zeros(1, 5, 5, 1, 2), torch.zeros(1, 5, 5, 1, 2), torch.zeros(1, 5, 5, 1, 2), 3, return_lse=True
    )[1]
    torch.testing.assert_close(lse, torch.full((1, 5, 5, 1), math.log(9)))


# NaN and infinity


def reached(out: Tensor) -> set[int]:
    """Queries whose result is not finite, in head 0 of batch item 0; nothing else may be touched."""
    bad = ~out.isfinite().all(-1)
    assert not bad[1:].any()
    assert not bad[..., 1:].any()
    return set(bad[0, ..., 0].flatten().nonzero().flatten().tolist())


@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("causal", [False, True])
def test_a_bad_key_reaches_who_sees_it_and_never_leaves_its_tile(which: str, bad: float, causal: bool) -> None:
    geometry = dt.Geometry((12, 14), (3,), (2,), is_causal=(causal,))
    query, key, value = (draw(2, 12, 14, 2, 4) for _ in range(3))
    token = 5 * 14 + 6
    {"key": key, "value": value}[which][0, 5, 6, 0] = bad
    seen_by = {int(q) for q in geometry.inverse_neighbors()[0][token] if q >= 0}

    options = {"dilation": 2, "is_causal": causal}
    exact = reached(dt.na2d(query, key, value, 3, **options, backend="reference"))
    assert exact == seen_by if math.isnan(bad) or which == "value" else exact <= seen_by

    plan = dt.Plan(geometry, tiled.choose_tile(geometry, 2, 2))
    tiles = {
        int(q) for c in plan.classes for row_base, col_base in zip(c.row_base, c.col_base, strict=True)
        if token in col_base + c.columns for q in row_base + c.rows
    }  # fmt: skip
    spread = reached(dt.na2d(query, key, value, 3, **options, backend="tiled"))
    assert spread <= tiles
    if math.isnan(bad):
        assert seen_by <= spread


# Wrong input


def call(rank: int = 2, **changes):
    query, key, value, rpb = case(rank)
    arguments = {"query": query, "key": key, "value": value, "kernel_size": 3, "rpb": rpb} | changes
    return NA[rank](**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
        (
            {"query": draw(2, 9, 4, 4)},
            ValueError,
            r"query must be \[batch, height, width, heads, dim\], got",
        ),
        (
            {"key": draw(2, 9, 8, 4)},
            ValueError,
            r"key must be \[batch, height, width, heads, dim\], got",
        ),
        (
            {"key": draw(2, 9, 7, 2, 4)},
            ValueError,
            r"key must have the batch and map .* \(2, 9, 8\), got \(2, 9, 7\)",
        ),
        ({"key": draw(2, 9, 8, 2, 5)}, ValueError, "key must have the head dim of query, 4, got 5"),
        (
            {"key": draw(2, 9, 8, 3, 4), "value": draw(2, 9, 8, 3, 4)},
            ValueError,
            "heads must divide query's 4, got 3",
        ),
        ({"value": draw(2, 9, 8, 4, 3)}, ValueError, "value must have the heads of key, 2, got 4"),
        ({"value": draw(2, 9, 8, 2, 0)}, ValueError, "value must have at least one head of at least one channel"),
        (
            {"query": torch.ones(2, 9, 8, 4, 4, dtype=torch.int64)},
            TypeError,
            "query must be float16, .* got torch.int64",
        ),
        (
            {"value": draw(2, 9, 8, 2, 3, dtype=torch.float32)},
            TypeError,
            "value must have the dtype of query, torch.float64",
        ),
        ({"value": draw(2, 9, 8, 2, 3).to("meta")}, ValueError, "value must be on the device of query, cpu, got meta"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
        (
            {"kernel_size": (3, 3, 3)},
            ValueError,
            r"kernel_size must be one integer or one per axis \(2\)",
        ),
        ({"kernel_size": 3.0}, TypeError, r"kernel_size must be an integer or 2 integers, got 3\.0"),
        ({"kernel_size": True}, TypeError, "kernel_size must be an integer or 2 integers, got True"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
        ({"dilation": 4}, ValueError, r"3 \* 4 = 12 exceeds length 9 of axis 0.*at most 3"),
        ({"stride": 4}, ValueError, "stride must not exceed kernel_size 3, got 4 on axis 0"),
        ({"is_causal": "yes"}, TypeError, "is_causal must be a boolean or 2 booleans, got 'yes'"),
        ({"rpb": draw(4, 5, 4)}, ValueError, r"rpb must have shape .* = \(4, 5, 5\), got \(4, 5, 4\)"),
        ({"rpb": torch.ones(4, 5, 5, dtype=torch.int32)}, TypeError, "rpb must be a floating tensor, got torch.int32"),
        ({"rpb": draw(4, 5, 5).to("meta")}, ValueError, "rpb must be on the device of query, cpu, got meta"),
        ({"scale": math.nan}, ValueError, "scale must be a finite number, got nan"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be at least 0 and below 1, got 1\.0"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p must be at least 0 and below 1, got -0\.1"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'triton', 'tiled', 'reference', got 'cuda'"),
        ({"backend": "triton"}, RuntimeError, "backend 'triton' cannot run this call: .* the tensors are on cpu"),
    ],
)
def test_wrong_input_says_what_would_be_right(changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)
