"""NATTEN's names, in the spellings of its versions, against the formulas and against NATTEN's own."""

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

needs_natten = pytest.mark.skipif(oracle.available() is not None, reason=str(oracle.available()))


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def brute_scores(query: Tensor, key: Tensor, sample: sampling.Sample, rpb: Tensor | None = None) -> Tensor:
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
    weights = torch.randn_like(theirs).masked_fill(theirs.isinf(), 0)
    grads = [torch.autograd.grad(out, leaves, weights, retain_graph=True) for out in (ours, theirs)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_scores_values_and_both_in_one_follow_the_formulas(rank: int) -> None:
    """With additional keys too, which join the softmax of every query."""
    fused, qk, av = (getattr(natten, f"na{rank}d{step}") for step in ("", "_qk", "_av"))
    for sample in SAMPLES[rank - 1 :: 3]:
        query, key, value = qkv = [leaf(2, 2, *sample.shape, 4) for _ in range(3)]
        rpb = leaf(2, *(2 * k - 1 for k in sample.kernel_size))
        window = {"kernel_size": sample.kernel_size, "dilation": sample.dilation, "is_causal": sample.is_causal}
        scores = brute_scores(query, key, sample, rpb)
        assert_same(qk(query, key, **window, rpb=rpb), scores, [query, key, rpb])
        attn = scores.detach().softmax(-1).requires_grad_()
        assert_same(av(attn, value, **window), brute_values(attn, value, sample), [attn, value])

        keys, values = more = [leaf(2, 2, EXTRA, 4) for _ in range(2)]
        scores = torch.cat((brute_scores(query, key, sample), torch.einsum("bh...d,bhkd->bh...k", query, keys)), -1)
        assert_same(qk(query, key, **window, additional_keys=keys), scores, [query, key, keys])
        attn = scores.softmax(-1)
        expected = brute_values(attn[..., :-EXTRA], value, sample)
        expected = expected + torch.einsum("bh...k,bhkd->bh...d", attn[..., -EXTRA:], values)
        assert_same(av(attn, value, **window, additional_values=values), expected, [*qkv, *more])
        options = dict(zip(("additional_keys", "additional_values"), (x.movedim(1, -2) for x in more), strict=True))
        out = fused(*(x.movedim(1, -2) for x in qkv), **window, scale=1.0, **options)
        assert_same(out.movedim(-2, 1), expected, [*qkv, *more])


@pytest.mark.parametrize("is_causal", [False, (False, True)])
def test_both_steps_differentiate_twice_and_forwards(is_causal) -> None:
    window = {"kernel_size": (3, 2), "dilation": (1, 2), "is_causal": is_causal}
    for function, inputs in (
        (lambda q, k, rpb: natten.na2d_qk(q, k, **window, rpb=rpb).nan_to_num(neginf=0.0), ((3,), (3,), None)),
        (lambda attn, value: natten.na2d_av(attn, value, **window), ((6,), (2,))),
    ):
        leaves = [leaf(2, 2, 5, 6, *last) if last else leaf(2, 5, 3) for last in inputs]
        torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
        torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


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
            grads = torch.autograd.grad(out.sum(), inputs)
            assert [x.dtype for x in (out, *grads)] == [x.dtype for x in (out.to(dtype), *inputs)]
            torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=rounding)
            wide = tuple(x.double() for x in grads)
            torch.testing.assert_close(wide, expected_grads, rtol=rounding, atol=8 * rounding)


def unfused_peak() -> int:
    query, key, value = torch.randn(3, 1, 4, 96, 96, 64)
    natten.na2d_qk(*torch.randn(2, 1, 4, 16, 16, 64), 9)
    return memory.resident_peak(lambda: natten.na2d_av(natten.na2d_qk(query, key, 9).softmax(-1), value, 9))


def test_the_scores_are_all_that_is_held() -> None:
    """Scores and probabilities take 22.8 MiB, NATTEN's own CPU kernels 25; gathering the keys would take 800."""
    assert 22 * 2**20 < memory.in_fresh_process(unfused_peak) < 40 * 2**20


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
        spellings = [("natten{}dqkrpb", "natten{}dqk", "natten{}dav")]
        spellings += [("na{}d_qk_with_bias", "na{}d_qk", "na{}d_av")] if module is natten_0_14 else []
        for names in spellings:
            qkrpb, qk, av = (getattr(module, name.format(rank)) for name in names)
            torch.testing.assert_close(qkrpb(query, key, rpb, *flat, keys), biased)
            torch.testing.assert_close(qkrpb(query, key, None, *flat, keys), plain)
            torch.testing.assert_close(qk(query, key, *flat, keys), plain)
            torch.testing.assert_close(av(plain.softmax(-1), value, *flat, values), weighted)


def test_positional_arguments_are_read_in_the_order_of_their_version() -> None:
    qkv, rpb = torch.randn(3, 1, 9, 10, 2, 4), torch.randn(2, 5, 5)

    def theirs(*arguments, **options):
        return natten.na2d(*qkv, 3, *arguments, **options)

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
        (natten_0_17.na2d(*qkv, 3, 2), {"dilation": 2}),
        (natten_0_20.na2d(*qkv, 3, 2), {"stride": 2}),
        (natten.neighborhood_attention_generic(*qkv, 3, 2), {"stride": 2}),
    ):
        torch.testing.assert_close(found, dt.na2d(*qkv, 3, **expected))


def test_modules_take_the_arguments_of_their_version() -> None:
    recent = natten.NeighborhoodAttention2D(16, 2, 3, 2, 2, (True, False), False, 0.1, 0.0)
    assert recent.window == [3, 3, 2, 2, 2, 2, 1, 0, 0, 0]
    assert (recent.scale, recent.head_dim, recent.kernel_size, recent.window_size) == (0.1, 8, (3, 3), (6, 6))
    assert set(recent.state_dict()) == {"qkv.weight", "proj.weight", "proj.bias"}
    older = natten.NeighborhoodAttention1D(16, 2, 3, 2, False, True, attn_drop=0.2)
    assert older.window == natten_0_17.NeighborhoodAttention1D(16, 2, 3, 2).window == [3, 1, 2, 0, 0]
    assert (older.attn_drop.p, older.scale, older.rpb.shape) == (0.2, 8**-0.5, (2, 5))
    assert natten_0_20.NeighborhoodAttention2D(16, 2, 3, 2).window == [3, 3, 2, 2, 1, 1, 0, 0, 0, 0]

    assert natten_0_14.NeighborhoodAttention1D(16, 2, 3, dilation=None).rpb.shape == (2, 5)
    plain = natten_0_14.NeighborhoodAttention1D(16, 2, 3, 2, False)
    assert (plain.kernel_size, plain.dilation, plain.window_size, plain.rpb) == (3, 2, 6, None)
    deep = natten_0_14.NeighborhoodAttention3D(16, 2, 3, 5, 1, 2)
    assert deep.window == [5, 3, 3, 1, 1, 1, 2, 1, 1, 0, 0, 0, 0, 0, 0]
    assert deep.rpb.shape == (2, 9, 5, 5)
    assert deep(torch.randn(1, 10, 5, 6, 16)).shape == (1, 10, 5, 6, 16)

    # No silent guess: until 0.15 a module had a bias by default.
    with pytest.warns(UserWarning, match="pass rel_pos_bias, or use dinat_triton.integrations.natten_0_14"):
        assert natten.NeighborhoodAttention2D(16, kernel_size=3, num_heads=2, dilation=None, attn_drop=0.0).rpb is None
    assert natten.NeighborhoodAttention2D(16, 2, 3, bias=True).rpb.shape == (2, 5, 5)


# Messages, and calls `f(names, query, key, value)` with tensors `[2, 8, 8, 2, 8]` that NATTEN refuses too.
REFUSED = {
    "kernel_size must be .* got '3'": lambda na, q, k, v: na.na2d(q, k, v, "3"),
    "kernel_size must be at least 2": lambda na, q, k, v: na.na2d(q, k, v, 1),
    "a kernel_size of at most 8": lambda na, q, k, v: na.na2d(q, k, v, 9),
    "a dilation of at most 2": lambda na, q, k, v: na.na2d(q, k, v, 3, dilation=3),
    "stride must .* got 4": lambda na, q, k, v: na.na2d(q, k, v, 3, stride=4),
    "is_causal must be .* got 1": lambda na, q, k, v: na.na2d(q, k, v, 3, is_causal=1),
    "dtype": lambda na, q, k, v: na.na2d(q, k.half(), v, 3),
    "key must": lambda na, q, k, v: na.na2d(q, k[:, 1:], v, 3),
    "heads": lambda na, q, k, v: na.na2d(q[..., :1, :], k, v, 3),
    "additional_keys and additional_values": lambda na, q, k, v: na.na2d(q, k, v, 3, additional_keys=k.flatten(1, 2)),
    "backend must be .* got 'cuda'": lambda na, q, k, v: na.na2d(q, k, v, 3, backend="cuda"),
    "1 to 3 map axes": lambda na, q, k, v: na.neighborhood_attention_generic(q[0, 0], k[0, 0], v[0, 0], 3),
    r"query must be \[batch, length": lambda na, q, k, v: na.attention(q, k, v),
    "value must": lambda na, q, k, v: na.attention(q[0], k[0], v[0, 1:]),
    "outputs must be two or more": lambda na, q, k, v: na.merge_attentions([q[0]], [q[0, ..., 0]]),
    "num_heads": lambda na, q, k, v: na.NeighborhoodAttention2D(16, 3, 3),
    "stride must .* got 0": lambda na, q, k, v: na.NeighborhoodAttention2D(16, 2, 3, 0),
}


@needs_natten
@pytest.mark.parametrize(("message", "call"), REFUSED.items(), ids=REFUSED.keys())
def test_what_natten_refuses_is_refused_as_it_does(message: str, call) -> None:
    import natten as installed
    from natten.functional import neighborhood_attention_generic

    theirs = SimpleNamespace(**vars(installed), neighborhood_attention_generic=neighborhood_attention_generic)
    inputs = torch.randn(3, 2, 8, 8, 2, 8)
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)) as refusal:
        call(theirs, *inputs)
    with pytest.raises(refusal.type, match=message):
        call(natten_0_20, *inputs)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "na2d got 2 after kernel_size.*dilation=2 or stride=2", lambda q: natten.na2d(q, q, q, 3, 2)),
        (TypeError, "dilation by position and by name", lambda q: natten.na2d(q, q, q, 3, 1, 2, dilation=2)),
        (TypeError, "at most 6 .* got 7", lambda q: natten.na2d(q, q, q, 3, 1, 2, False, None, None, None, None)),
        (TypeError, "tile_shape", lambda q: natten.na2d(q, q, q, 3, tile_shape=2)),
        (TypeError, "2D got 2 after kernel_size", lambda q: natten.NeighborhoodAttention2D(16, 2, 3, 2)),
        (TypeError, "bias", lambda q: natten_0_17.NeighborhoodAttention2D(16, 2, 3, bias=True)),
        (ValueError, r"query of na2d_qk must be \[batch, heads, height,", lambda q: natten.na2d_qk(q[0], q[0], 3)),
        (ValueError, "kernel", lambda q: natten.natten2dqkrpb(q, q, None, 3, 3)),
        (ValueError, r"rpb must .*\(2, 5, 5\), got", lambda q: natten.natten2dqkrpb(q, q, q[0, :, :3, :3, 0], 3, 2)),
        (ValueError, r"attn must .*\(1, 2, 6, 6, 9\), got \(1, 2, 6, 6, 4\)", lambda q: natten.natten2dav(q, q, 3, 2)),
        (ValueError, "key must have the batch and map", lambda q: natten.na2d_qk(q, q[..., :5, :], 3)),
        # As C++ does.
        (RuntimeError, "odd", lambda q: natten_0_17.na2d_qk(q, q, 4)),
        (RuntimeError, "kernel", lambda q: natten_0_17.na2d_qk(q, q, 9)),
        (RuntimeError, "odd", lambda q: natten_0_14.natten2dav(q, q, 4, 1)),
        (RuntimeError, "dilation", lambda q: natten_0_14.natten2dav(q.new_zeros(1, 2, 6, 6, 9), q, 3, 0)),
    ],
)
def test_what_is_refused_is_named(error: type[Exception], message: str, call) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(1, 2, 6, 6, 4))


LAYOUTS = {
    "channels first": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
    "every other channel": lambda x: torch.stack((x, x + 1), -1).flatten(-2)[..., ::2],
    "every other row": lambda x: torch.stack((x, x + 1), 2).flatten(1, 2)[:, ::2],
    "expanded": lambda x: x[:1, :1, ..., :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_in_memory_change_nothing(layout) -> None:
    """NATTEN answers some of them wrongly and says nothing."""
    x, attn = [torch.randn(2, 6, 7, 2, 4) for _ in range(3)], torch.randn(2, 6, 7, 2, 9)
    for call, inputs in (
        (lambda q, k, v: natten.attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)), x),
        (lambda q, k: natten.na2d_qk(q.movedim(-2, 1), k.movedim(-2, 1), 3), x[:2]),
        (lambda a, v: natten.na2d_av(a.movedim(-2, 1), v.movedim(-2, 1), 3), [attn, x[0]]),
        (lambda *outs: natten.merge_attentions([o[0] for o in outs], [o[0, ..., 0] for o in outs])[0], x),
    ):
        strided = [layout(t).requires_grad_() for t in inputs]
        plain = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in strided]
        outs = [call(*tensors) for tensors in (strided, plain)]
        torch.testing.assert_close(*outs)
        grads = [torch.autograd.grad(o.square().sum(), t) for o, t in zip(outs, (strided, plain), strict=True)]
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


@needs_natten
@pytest.mark.parametrize("name", ["na1d", "na2d", "na3d", *(f"NeighborhoodAttention{rank}D" for rank in (1, 2, 3))])
def test_arguments_of_the_installed_natten_are_known_in_their_order(name: str) -> None:
    import natten as installed

    order = (arguments.MODULE if name.startswith("N") else arguments.FUSED)["0.20"]
    names = tuple(inspect.signature(getattr(installed, name)).parameters)
    after = names[names.index("kernel_size") + 1 :]
    assert after[: len(order)] == order
    assert set(after[len(order) :]) <= arguments.KNOBS | {"backend", "return_lse"}
