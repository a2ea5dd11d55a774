"""The public functions: what they compute under every option, and what they say to wrong input."""

import math
import random

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import dinat_triton as dt
from dinat_triton import tile_groups, tiled
from dinat_triton.bench.memory import in_fresh_process, resident_peak
from tests.oracles import sampling
from tests.oracles.cases import NA, check, check_wanted, hide, make_case

BACKENDS = ("reference", "tiled")


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def case(batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return draw(batch, 9, 8, 4, 4), draw(batch, 9, 8, 2, 4), draw(batch, 9, 8, 2, 3), draw(4, 5, 5)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# What it computes


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


@pytest.mark.parametrize("rank", NA)
@pytest.mark.usefixtures("poisoned")
def test_tiles_of_any_size_give_the_same_answer(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(rank)
    for sample in sampling.samples(20, seed=rank, ranks=(rank,), max_tokens=60, borders=sampling.BORDERS):
        tile = tuple(rng.randint(1, n) for n in sample.shape)
        monkeypatch.setattr(tiled, "choose_tile", lambda *_, tile=tile: tile)
        monkeypatch.setattr(tile_groups, "SCORES_AT_ONCE", rng.choice([1, 50, 1 << 20]))
        monkeypatch.setattr(tile_groups, "KEPT_TOKENS", rng.choice([0, 1 << 12]))
        tile_groups.cut_of.cache_clear()
        case = make_case(sample, rng, scale=0.3, dropout_p=rng.choice([0.0, 0.4]))
        check(case, torch.float64, 1e-12, "tiled")


@pytest.mark.parametrize("kernel", [3, 5])  # some tiles of the map, and one that is all of it
def test_gradients_that_are_wanted_alone(kernel: int, poisoned: None) -> None:
    sample = sampling.Sample((5, 5), (kernel, kernel), (1, 1), (1, 1), (False, False))
    for backend in BACKENDS:
        check_wanted(make_case(sample, random.Random(0), batch=2, biased=True, dropout_p=0.2), backend)


def peak_of_large_windows() -> int:
    *qkv, rpb = inputs = [torch.randn(shape, requires_grad=True) for shape in [(1, 4096, 1, 8)] * 3 + [(1, 4001)]]
    torch.autograd.grad(dt.na1d(*(x[:, :3] for x in qkv), 3, rpb=rpb[:, :5], backend="tiled").sum(), inputs)
    return resident_peak(lambda: torch.autograd.grad(dt.na1d(*qkv, 2001, rpb=rpb, backend="tiled").sum(), inputs))


def test_large_windows_take_a_few_tiles_worth_of_memory() -> None:
    """Eight tensors of 128 kB, and what tiles of a million scores need; there are eleven million."""
    assert in_fresh_process(peak_of_large_windows) < 34 << 20


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
    assert query.grad.shape == query.shape
    assert not rpb.grad.any()


# NaN and infinity


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_query_that_sees_nothing_gets_zeros_and_gives_none(backend: str, causal: bool) -> None:
    sample = sampling.Sample((9,), (3,), (2,), (1,), (causal,))
    case = make_case(sample, random.Random(0), heads=4, batch=2, biased=True)
    empty = hide(case)
    found = case.run(backend, torch.float64)
    assert torch.equal(found["lse"] == -torch.inf, empty)
    assert torch.equal((found["out"] == 0).all(-1), empty)
    query, key, value, rpb = case.leaves
    close(dt.na1d(query, key, value, rpb=rpb, **sample.kwargs(), backend=backend), found["out"])  # without lse
    case.grad_out[empty], case.grad_lse[empty] = 0, 0
    case.leaves[3].clamp_(min=-1e3)
    for name, expected in case.run("reference", torch.float64).items():
        if name.startswith("grad"):
            close(found[name], expected)


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


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
        ({"query": draw(2, 9, 4, 4)}, ValueError, r"query must be \[batch, height, width, heads, dim\], got"),
        ({"key": draw(2, 9, 7, 2, 4)}, ValueError, r"key must have the batch and map .* \(2, 9, 8\), got \(2, 9, 7\)"),
        ({"key": draw(2, 9, 8, 2, 5)}, ValueError, "key must have the head dim of query, 4, got 5"),
        ({"query": draw(2, 9, 8, 5, 4)}, ValueError, "heads must divide query's 5, got 2"),
        ({"value": draw(2, 9, 8, 4, 3)}, ValueError, "value must have the heads of key, 2, got 4"),
        ({"value": draw(2, 9, 8, 2, 0)}, ValueError, "value must have at least one head of at least one channel"),
        ({"query": draw(2, 9, 8, 4, 4).long()}, TypeError, "query must be float16, .* got torch.int64"),
        ({"value": draw(2, 9, 8, 2, 3).float()}, TypeError, "value must have the dtype of query, torch.float64"),
        ({"value": draw(2, 9, 8, 2, 3).to("meta")}, ValueError, "value must be on the device of query, cpu, got meta"),
        ({"kernel_size": 3.0}, TypeError, r"kernel_size must be an integer or 2 integers, got 3\.0"),
        ({"dilation": 4}, ValueError, r"3 \* 4 = 12 exceeds .* 9 of axis 0.*at most 3.* are \[batch, \*map, heads"),
        ({"rpb": draw(4, 5, 4)}, ValueError, r"rpb must have shape .* = \(4, 5, 5\), got \(4, 5, 4\)"),
        ({"rpb": draw(4, 5, 5).int()}, TypeError, "rpb must be a floating tensor, got torch.int32"),
        ({"rpb": draw(4, 5, 5).to("meta")}, ValueError, "rpb must be on the device of query, cpu, got meta"),
        ({"scale": math.nan}, ValueError, "scale must be a finite number, got nan"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be at least 0 and below 1, got 1\.0"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'triton', 'tiled', 'reference', got 'cuda'"),
        ({"backend": "triton"}, RuntimeError, "backend 'triton' cannot run this call: .* the tensors are on cpu"),
    ],
)
def test_wrong_input_says_what_would_be_right(changes: dict, error: type, message: str) -> None:
    query, key, value, rpb = case()
    with pytest.raises(error, match=message):
        dt.na2d(**({"query": query, "key": key, "value": value, "kernel_size": 3, "rpb": rpb} | changes))
