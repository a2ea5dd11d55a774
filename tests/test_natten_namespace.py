"""NATTEN's names, in the spellings of its versions, against the formulas, and a module as the NAT repository has it."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import dinat_triton as dt
from dinat_triton.bench import memory
from dinat_triton.integrations import natten, natten_0_14, natten_0_17, natten_0_20
from dinat_triton.integrations.natten import arguments
from tests.oracles import brute, sampling
from tests.oracles import natten as oracle

SAMPLES = sampling.samples(24, seed=5, max_tokens=60, strided=False)
EXTRA = 3


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def brute_scores(query: Tensor, key: Tensor, rpb: Tensor | None, sample: sampling.Sample) -> Tensor:
    """The definition of the scores. Slots that a causal window lacks are -inf."""
    keys, places = brute.table(sample.shape, *sample.kwargs().values())
    scores = torch.einsum("bhnd,bhnkd->bhnk", query.flatten(2, -2), key.flatten(2, -2)[:, :, keys])
    scores = scores if rpb is None else scores + rpb.flatten(1)[:, places]
    return scores.masked_fill(keys < 0, -torch.inf).unflatten(2, sample.shape)


def brute_values(attn: Tensor, value: Tensor, sample: sampling.Sample) -> Tensor:
    keys, _ = brute.table(sample.shape, *sample.kwargs().values())
    weights = attn.flatten(2, -2).masked_fill(keys < 0, 0)
    return torch.einsum("bhnk,bhnkd->bhnd", weights, value.flatten(2, -2)[:, :, keys]).unflatten(2, sample.shape)


def assert_same(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    """Values, and the gradients of all leaves; -inf is nobody's."""
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(theirs)
    grads = [
        torch.autograd.grad((out.masked_fill(out.isinf(), 0) * weights).sum(), leaves, materialize_grads=True)
        for out in (ours, theirs)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_scores_and_values_follow_the_formulas(rank: int) -> None:
    qk, av = getattr(natten, f"na{rank}d_qk"), getattr(natten, f"na{rank}d_av")
    for sample in (s for s in SAMPLES if s.rank == rank):
        query, key, value = (leaf(2, 2, *sample.shape, 4) for _ in range(3))
        rpb = leaf(2, *(2 * k - 1 for k in sample.kernel_size))
        window = {"kernel_size": sample.kernel_size, "dilation": sample.dilation, "is_causal": sample.is_causal}
        expected = brute_scores(query, key, rpb, sample)
        assert_same(qk(query, key, **window, rpb=rpb), expected, [query, key, rpb])
        assert_same(qk(query, key, **window), brute_scores(query, key, None, sample), [query, key])

        attn = expected.detach().softmax(-1).requires_grad_()
        assert_same(av(attn, value, **window), brute_values(attn, value, sample), [attn, value])


@pytest.mark.parametrize("is_causal", [False, (False, True)])
def test_both_steps_differentiate_twice_and_forwards(is_causal) -> None:
    query, key, value, rpb = leaf(2, 2, 5, 6, 3), leaf(2, 2, 5, 6, 3), leaf(2, 2, 5, 6, 2), leaf(2, 5, 3)
    attn = leaf(2, 2, 5, 6, 6)

    def qk(query: Tensor, key: Tensor, rpb: Tensor) -> Tensor:
        scores = natten.na2d_qk(query, key, (3, 2), (1, 2), is_causal=is_causal, rpb=rpb)
        return scores.masked_fill(scores.isinf(), 0)

    def av(attn: Tensor, value: Tensor) -> Tensor:
        return natten.na2d_av(attn, value, (3, 2), (1, 2), is_causal=is_causal)

    for function, inputs in ((qk, (query, key, rpb)), (av, (attn, value))):
        torch.autograd.gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
        torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs_take_wider_biases_and_weights(dtype: torch.dtype) -> None:
    """As NATTEN does, with and without autocast, in a compiled graph too; what is narrow is rounded once."""
    inputs = [torch.randn(2, 2, 9, 10, 8).to(dtype).requires_grad_() for _ in range(3)]
    inputs.append(torch.randn(2, 5, 5, requires_grad=True))

    def attend(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
        scores = natten.na2d_qk(query, key, 3, 2, rpb=rpb)
        return natten.na2d_av(scores.float().softmax(-1), value, 3, 2)

    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = dt.na2d(*(x.movedim(1, -2) for x in exact[:3]), 3, dilation=2, rpb=exact[3], scale=1).movedim(-2, 1)
    expected_grads = torch.autograd.grad(expected.sum(), exact)
    rounding = 4 * torch.finfo(dtype).eps
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        for autocast in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                out = function(*inputs)
            assert out.dtype == dtype
            torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=rounding)
            grads = torch.autograd.grad(out.sum(), inputs)
            assert [g.dtype for g in grads] == [x.dtype for x in inputs]
            for ours, theirs in zip(grads, expected_grads, strict=True):
                torch.testing.assert_close(ours.double(), theirs, rtol=rounding, atol=8 * rounding)


def unfused_peak() -> int:
    query, key, value = torch.randn(3, 1, 4, 96, 96, 64)
    natten.na2d_qk(*torch.randn(2, 1, 4, 16, 16, 64), 9)
    return memory.resident_peak(lambda: natten.na2d_av(natten.na2d_qk(query, key, 9).softmax(-1), value, 9))


def test_the_scores_are_all_that_is_held() -> None:
    """Scores and probabilities take 22.8 MiB, NATTEN's own CPU kernels 25; gathering the keys would take 800."""
    peak = memory.in_fresh_process(unfused_peak)
    assert 22 * 2**20 < peak < 40 * 2**20


def test_both_steps_are_the_fused_function() -> None:
    """With a softmax between them, also with additional keys, which join the softmax of every query."""
    for sample in SAMPLES[:9]:
        rank = sample.rank
        query, key, value = (leaf(1, 2, *sample.shape, 4) for _ in range(3))
        keys, values = leaf(1, 2, EXTRA, 4), leaf(1, 2, EXTRA, 4)
        window = {"dilation": sample.dilation, "is_causal": sample.is_causal}
        qk, av = getattr(natten, f"na{rank}d_qk"), getattr(natten, f"na{rank}d_av")
        attn = qk(query * 0.3, key, sample.kernel_size, additional_keys=keys, **window).softmax(-1)
        expected = av(attn, value, sample.kernel_size, additional_values=values, **window)

        last = [x.movedim(1, -2) for x in (query, key, value)]
        extra = {"additional_keys": keys.movedim(1, -2), "additional_values": values.movedim(1, -2)}
        fused = getattr(natten, f"na{rank}d")(*last, sample.kernel_size, scale=0.3, **window, **extra)
        torch.testing.assert_close(fused.movedim(-2, 1), expected)
        leaves = [query, key, value, keys, values]
        grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (fused, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("module", [natten, natten_0_14, natten_0_17])
@pytest.mark.parametrize("extra", [0, EXTRA])
def test_older_names_are_the_same_functions(module, extra: int) -> None:
    for rank, window, flat in ((1, (3, 2), (3, 2)), (2, (3, 2), (3, 2)), (3, ((5, 3, 3), (1, 2, 2)), (5, 3, 1, 2))):
        query, key, value = torch.randn(3, 2, 2, *(6, 7, 6)[3 - rank :], 4)
        keys, values = torch.randn(2, 2, 2, extra, 4) if extra else (None, None)
        rpb = torch.randn(2, *([9, 5, 5] if rank == 3 else [5] * rank))
        qk, av = getattr(natten, f"na{rank}d_qk"), getattr(natten, f"na{rank}d_av")
        biased, plain = qk(query, key, *window, keys, rpb=rpb), qk(query, key, *window, keys)
        weighted = av(plain.softmax(-1), value, *window, values)
        older = [getattr(module, f"natten{rank}d{step}") for step in ("qkrpb", "qk", "av")]
        both = [older]
        if module is natten_0_14:
            both.append([getattr(module, f"na{rank}d_{step}") for step in ("qk_with_bias", "qk", "av")])
        for qkrpb, qk, av in both:
            torch.testing.assert_close(qkrpb(query, key, rpb, *flat, keys), biased)
            torch.testing.assert_close(qkrpb(query, key, None, *flat, keys), plain)
            torch.testing.assert_close(qk(query, key, *flat, keys), plain)
            torch.testing.assert_close(av(plain.softmax(-1), value, *flat, values), weighted)


def test_positional_arguments_are_read_in_the_order_of_their_version() -> None:
    query, key, value = torch.randn(3, 1, 9, 10, 2, 4)
    rpb = torch.randn(2, 5, 5)

    def theirs(*arguments, **options):
        return natten.na2d(query, key, value, 3, *arguments, **options)

    same = {"stride": (1, 2), "dilation": (3, 2), "is_causal": (True, False), "scale": 0.1}
    for found, expected in (
        (theirs(), {}),
        (theirs(1), {}),
        (theirs(2, 3), {"stride": 2, "dilation": 3}),
        (theirs(2, dilation=3), {"stride": 2, "dilation": 3}),
        (theirs(*same.values()), same),
        (theirs(2, True), {"dilation": 2, "is_causal": True}),
        (theirs((2, 3), (False, True)), {"dilation": (2, 3), "is_causal": (False, True)}),
        (theirs(3, None, rpb, 0.1), {"dilation": 3, "rpb": rpb, "scale": 0.1}),
        (theirs(3, rpb=rpb), {"dilation": 3, "rpb": rpb}),
        (theirs(dilation=2, backend="cutlass-fna", q_tile_shape=(8, 8)), {"dilation": 2}),
        (theirs(return_lse=True), {"return_lse": True}),
        (theirs(stride=None, dilation=None, is_causal=None), {}),
        (natten_0_17.na2d(query, key, value, 3, 2), {"dilation": 2}),
        (natten_0_20.na2d(query, key, value, 3, 2), {"stride": 2}),
        (natten.neighborhood_attention_generic(query, key, value, 3, 2), {"stride": 2}),
    ):
        torch.testing.assert_close(found, dt.na2d(query, key, value, 3, **expected))
    with pytest.raises(TypeError, match=r"na2d got 2 after kernel_size.*dilation=2 or stride=2"):
        theirs(2)
    with pytest.raises(TypeError, match="dilation by position and by name"):
        theirs(1, 2, dilation=2)
    with pytest.raises(TypeError, match="at most 6 arguments after kernel_size, got 7"):
        theirs(1, 2, False, None, None, None, None)
    with pytest.raises(TypeError, match="tile_shape"):
        theirs(tile_shape=2)
    with pytest.raises(ValueError, match="must be given together"):
        theirs(additional_keys=key.flatten(1, 2))


def test_modules_take_the_arguments_of_their_version() -> None:
    recent = natten.NeighborhoodAttention2D(16, 2, 3, 2, 2, (True, False), False, 0.1, 0.0)
    assert recent.window == [3, 3, 2, 2, 2, 2, 1, 0, 0, 0]
    assert (recent.scale, recent.head_dim, recent.kernel_size, recent.window_size) == (0.1, 8, (3, 3), (6, 6))
    assert set(recent.state_dict()) == {"qkv.weight", "proj.weight", "proj.bias"}
    older = natten.NeighborhoodAttention1D(16, 2, 3, 2, False, True, attn_drop=0.2)
    assert older.window == natten_0_17.NeighborhoodAttention1D(16, 2, 3, 2).window == [3, 1, 2, 0, 0]
    assert older.rpb.shape == (2, 5)
    assert (older.attn_drop.p, older.scale) == (0.2, 8**-0.5)
    assert natten_0_20.NeighborhoodAttention2D(16, 2, 3, 2).window == [3, 3, 2, 2, 1, 1, 0, 0, 0, 0]
    with pytest.raises(TypeError, match="NeighborhoodAttention2D got 2 after kernel_size"):
        natten.NeighborhoodAttention2D(16, 2, 3, 2)
    with pytest.raises(TypeError, match="bias"):
        natten_0_17.NeighborhoodAttention2D(16, 2, 3, bias=True)

    assert natten_0_14.NeighborhoodAttention1D(16, 2, 3, dilation=None).rpb.shape == (2, 5)
    plain = natten_0_14.NeighborhoodAttention1D(16, 2, 3, 2, False)
    assert plain.rpb is None
    assert (plain.kernel_size, plain.dilation, plain.window_size) == (3, 2, 6)
    deep = natten_0_14.NeighborhoodAttention3D(16, 2, 3, 5, 1, 2)
    assert deep.window == [5, 3, 3, 1, 1, 1, 2, 1, 1, 0, 0, 0, 0, 0, 0]
    assert deep.rpb.shape == (2, 9, 5, 5)
    assert deep(torch.randn(1, 10, 5, 6, 16)).shape == (1, 10, 5, 6, 16)


def test_a_module_without_the_bias_it_had_until_0_15_is_no_silent_guess() -> None:
    with pytest.warns(UserWarning, match="pass rel_pos_bias, or use dinat_triton.integrations.natten_0_14"):
        assert natten.NeighborhoodAttention2D(16, kernel_size=3, num_heads=2, dilation=None, attn_drop=0.0).rpb is None
    assert natten.NeighborhoodAttention2D(16, 2, 3, bias=True).rpb.shape == (2, 5, 5)


def test_wrong_shapes_are_named() -> None:
    query = torch.randn(1, 2, 6, 6, 4)
    with pytest.raises(ValueError, match=r"query of na2d_qk must be \[batch, heads, height, width, dim\]"):
        natten.na2d_qk(query[0], query[0], 3)
    with pytest.raises(ValueError, match="kernel_size"):
        natten.natten2dqkrpb(query, query, None, 3, 3)
    with pytest.raises(ValueError, match=r"rpb must have shape \(2, 5, 5\), got \(2, 3, 3\)"):
        natten.natten2dqkrpb(query, query, torch.randn(2, 3, 3), 3, 2)
    with pytest.raises(ValueError, match=r"attn must have shape \(1, 2, 6, 6, 9\), got \(1, 2, 6, 6, 4\)"):
        natten.natten2dav(query, query, 3, 2)
    with pytest.raises(ValueError, match="key must have the batch and map of query"):
        natten.na2d_qk(query, query[..., :5, :], 3)


BAD_CALLS = {
    "kernel of no number": lambda na, q, k, v: na.na2d(q, k, v, "3"),
    "kernel of another rank": lambda na, q, k, v: na.na2d(q, k, v, (3, 3, 3)),
    "kernel 1": lambda na, q, k, v: na.na2d(q, k, v, 1),
    "kernel beyond the map": lambda na, q, k, v: na.na2d(q, k, v, 9),
    "dilation beyond the map": lambda na, q, k, v: na.na2d(q, k, v, 3, dilation=3),
    "dilation 0": lambda na, q, k, v: na.na2d(q, k, v, 3, dilation=0),
    "stride beyond the kernel": lambda na, q, k, v: na.na2d(q, k, v, 3, stride=4),
    "stride of no number": lambda na, q, k, v: na.na2d(q, k, v, 3, stride=1.5),
    "causality of no truth": lambda na, q, k, v: na.na2d(q, k, v, 3, is_causal=1),
    "another dtype": lambda na, q, k, v: na.na2d(q, k.half(), v, 3),
    "another map": lambda na, q, k, v: na.na2d(q, k[:, 1:], v, 3),
    "another head dim": lambda na, q, k, v: na.na2d(q, k[..., 1:], v, 3),
    "another batch": lambda na, q, k, v: na.na2d(q, k[:1], v, 3),
    "heads that do not divide": lambda na, q, k, v: na.na2d(q[..., :1, :], k, v, 3),
    "additional keys alone": lambda na, q, k, v: na.na2d(q, k, v, 3, additional_keys=k.flatten(1, 2)),
    "an unknown backend": lambda na, q, k, v: na.na2d(q, k, v, 3, backend="cuda"),
    "no map": lambda na, q, k, v: na.neighborhood_attention_generic(q[0, 0], k[0, 0], v[0, 0], 3),
    "attention on a map": lambda na, q, k, v: na.attention(q, k, v),
    "attention to other values": lambda na, q, k, v: na.attention(q[0], k[0], v[0, 1:]),
    "one part to merge": lambda na, q, k, v: na.merge_attentions([q[0]], [q[0, ..., 0]]),
    "a module's heads": lambda na, q, k, v: na.NeighborhoodAttention2D(16, 3, 3),
    "a module's stride": lambda na, q, k, v: na.NeighborhoodAttention2D(16, 2, 3, 0),
}


@pytest.mark.skipif(oracle.available() is not None, reason=str(oracle.available()))
@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_what_natten_refuses_is_refused_as_it_does(call) -> None:
    import natten as installed
    from natten.functional import neighborhood_attention_generic

    theirs = SimpleNamespace(**vars(installed), neighborhood_attention_generic=neighborhood_attention_generic)
    inputs = torch.randn(3, 2, 8, 8, 2, 8)
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)) as refusal:
        call(theirs, *inputs)
    with pytest.raises(refusal.type):
        call(natten_0_20, *inputs)


def test_older_versions_refuse_as_their_kernels_did() -> None:
    """With a RuntimeError, as C++ does."""
    query = torch.randn(1, 2, 8, 8, 4)
    for bad in ({"kernel_size": 4}, {"kernel_size": 9}, {"kernel_size": 3, "dilation": 0}):
        with pytest.raises(RuntimeError):
            natten_0_17.na2d_qk(query, query, **bad)
        with pytest.raises(RuntimeError):
            natten_0_14.natten2dav(query.new_zeros(1, 2, 8, 8, 9), query, **{"dilation": 1} | bad)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
    "every other channel": lambda x: torch.stack((x, x + 1), -1).flatten(-2)[..., ::2],
    "every other row": lambda x: torch.stack((x, x + 1), 2).flatten(1, 2)[:, ::2],
    "a part": lambda x: torch.cat((x + 1, x), -1)[..., x.shape[-1] :],
    "expanded": lambda x: x[:1, :1].expand_as(x),
    "expanded channels": lambda x: x[..., :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_in_memory_change_nothing(layout) -> None:
    """NATTEN answers some of them wrongly and says nothing."""
    x = [torch.randn(2, 6, 7, 2, 4) for _ in range(3)]
    attn = torch.randn(2, 6, 7, 2, 9)
    calls = [
        (lambda q, k, v: natten.na2d(q, k, v, 3, dilation=2), x),
        (lambda q, k, v: natten.attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)), x),
        (lambda q, k: natten.na2d_qk(q.movedim(-2, 1), k.movedim(-2, 1), 3), x[:2]),
        (lambda a, v: natten.na2d_av(a.movedim(-2, 1), v.movedim(-2, 1), 3), [attn, x[0]]),
        (lambda *outs: natten.merge_attentions([o[0] for o in outs], [o[0, ..., 0] for o in outs]), x),
    ]
    for call, inputs in calls:
        strided = [layout(t).requires_grad_() for t in inputs]
        plain = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in strided]
        outs = [torch.utils._pytree.tree_leaves(call(*tensors)) for tensors in (strided, plain)]
        torch.testing.assert_close(*outs)
        sums = [sum(o.square().sum() for o in out) for out in outs]
        grads = [torch.autograd.grad(total, t) for total, t in zip(sums, (strided, plain), strict=True)]
        torch.testing.assert_close(*grads)


def test_nested_tensors_are_taken_one_by_one() -> None:
    inputs = [[torch.randn(b, 2, n, 8, 4, requires_grad=True) for b, n in ((1, 6), (2, 7))] for _ in range(3)]
    query, key, value = (torch.nested.as_nested_tensor(parts) for parts in inputs)
    out = natten.na2d_av(natten.na2d_qk(query, key, 3), value, 3)
    for got, *parts in zip(out.unbind(), *inputs, strict=True):
        torch.testing.assert_close(got, natten.na2d_av(natten.na2d_qk(*parts[:2], 3), parts[2], 3))
    out.unbind()[0].sum().backward()
    assert inputs[0][0].grad.abs().sum() > 0
    with pytest.raises(NotImplementedError, match="no nested tensors"):
        natten.na2d(query, key, value, 3)


@pytest.mark.skipif(oracle.available() is not None, reason=str(oracle.available()))
@pytest.mark.parametrize("name", ["na1d", "na2d", "na3d", *(f"NeighborhoodAttention{rank}D" for rank in (1, 2, 3))])
def test_all_arguments_of_the_installed_natten_are_known(name: str) -> None:
    import natten as installed

    function = getattr(installed, name)
    is_class = inspect.isclass(function)
    known = set((arguments.MODULE if is_class else arguments.FUSED)["0.20"]) | arguments.KNOBS
    known |= {"query", "key", "value", "kernel_size", "embed_dim", "num_heads", "backend", "return_lse"}
    assert set(inspect.signature(function).parameters) <= known


@pytest.mark.skipif(oracle.available() is not None, reason=str(oracle.available()))
def test_a_positional_call_means_what_it_means_to_natten() -> None:
    sample = sampling.Sample((9, 10), (3, 4), (2, 2), (2, 3), (True, False))
    query, key, value = torch.randn(3, 2, 9, 10, 2, oracle.HEAD_DIM)
    expected = oracle.attention(query, key, value, sample)
    got = natten.na2d(query, key, value, (3, 4), (2, 3), (2, 2), (True, False), return_lse=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
