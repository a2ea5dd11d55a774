"""Attention to all keys, merged parts, permuted tokens and counted operations under NATTEN's names."""

import math

import pytest
import torch
from torch import Tensor, nn

from dinat_triton.integrations import natten
from dinat_triton.integrations.natten import flops
from dinat_triton.integrations.natten.token_permute import token_permute_operation, token_unpermute_operation
from dinat_triton.integrations.natten.varlen import generate_varlen_parameters
from tests.oracles import natten as oracle


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition, heads last."""
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], 2) for x in (key, value))
    logits = scale * torch.einsum("bnhd,bmhd->bnhm", query, key)
    if is_causal:
        above = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(above[:, None], -torch.inf)
    return torch.einsum("bnhm,bmhd->bnhd", logits.softmax(-1), value), logits.logsumexp(-1)


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], leaves: list[Tensor]) -> None:
    """Outputs and log-sum-exps, and the gradients through both."""
    torch.testing.assert_close(ours, theirs)
    weights = [torch.randn_like(x) for x in theirs]
    grads = [torch.autograd.grad(pair, leaves, weights) for pair in (ours, theirs)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(7, 7), (7, 3), (8, 4), (3, 8), (4, 8), (1, 3), (5, 1)])
def test_every_query_attends_to_all_keys(n: int, m: int, is_causal: bool) -> None:
    query, key, value = leaf(2, n, 4, 3), leaf(2, m, 2, 3), leaf(2, m, 2, 5)
    ours = natten.attention(query, key, value, is_causal, 0.3, return_lse=True, backend="hopper-fmha")
    assert_same(ours, softmax_attention(query, key, value, is_causal, 0.3), [query, key, value])


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences_do_not_see_each_other(is_causal: bool) -> None:
    lengths = torch.tensor([[3, 5, 0, 2], [4, 5, 2, 0]], dtype=torch.int32)
    query, key, value = leaf(1, 10, 2, 3), leaf(1, 11, 2, 3), leaf(1, 11, 2, 3)
    ours = natten.attention(query, key, value, is_causal, seqlens_Q=lengths[0], seqlens_KV=lengths[1], return_lse=True)
    parts = [x.split(sizes.tolist(), 1) for x, sizes in zip((query, key, value), lengths[[0, 1, 1]], strict=True)]
    expected = [softmax_attention(*part, is_causal, 3**-0.5) for part in list(zip(*parts, strict=True))[:2]]
    seen = (ours[0][:, :8], ours[1][:, :8])
    assert_same(seen, tuple(torch.cat(x, 1) for x in zip(*expected, strict=True)), [query, key, value])
    assert (ours[0][:, 8:] == 0).all()  # no keys
    assert (ours[1][:, 8:] == -math.inf).all()

    *sums, longest_query, longest_key = generate_varlen_parameters(query, key, value, *lengths)
    assert (longest_query, longest_key) == (5, 5)
    names = ("cumulative_seqlen_Q", "cumulative_seqlen_KV", "max_seqlen_Q", "max_seqlen_KV")
    given = dict(zip(names, (*sums, longest_query, longest_key), strict=True))
    compiled = torch.compile(natten.attention, fullgraph=True, dynamic=True, backend="aot_eager")
    results = [f(query, key, value, is_causal, **given, return_lse=True) for f in (natten.attention, compiled)]
    assert_same(*results, [query, key, value])
    longer = [torch.cat((x, x[:, :4]), 1) for x in (query, key, value)]  # than their sequences
    for attention in (natten.attention, compiled):
        out = attention(*longer, is_causal, **given)
        torch.testing.assert_close(out, nn.functional.pad(ours[0], (0, 0, 0, 0, 0, 4)))
    with pytest.raises(ValueError, match="must be given together"):
        natten.attention(query, key, value, cumulative_seqlen_Q=sums[0])
    for wrong in (sums[1] + 1, sums[1].flip(0), sums[1] * 2):
        with pytest.raises(ValueError, match="cumulative_seqlen_KV must ascend from 0 to at most the length 11"):
            natten.attention(query, key, value, **given | {"cumulative_seqlen_KV": wrong})


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_sequences_without_tokens_have_gradients_that_are_zero(backend: str | None) -> None:
    attend = torch.compile(natten.attention, fullgraph=True, backend=backend) if backend else natten.attention
    inputs, ends = [leaf(1, 4, 2, 3) for _ in range(3)], torch.zeros(3, dtype=torch.int32)
    out = attend(*inputs, False, None, None, None, ends, ends, 0, 0)
    assert not torch.stack((out, *torch.autograd.grad(out.sum(), inputs))).any()


def test_a_compiled_graph_of_packed_sequences_autocasts() -> None:
    query, lengths = torch.randn(1, 8, 2, 4), torch.tensor([3, 5], dtype=torch.int32)
    *sums, longest, _ = generate_varlen_parameters(query, query, query, lengths, lengths)

    def attend(query: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return natten.attention(query, query, query, False, None, None, None, *sums, longest, longest)

    expected = attend(query)
    assert expected.dtype == torch.bfloat16
    torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="aot_eager")(query), expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_rounded_once_and_have_no_gradients(dtype: torch.dtype) -> None:
    query, key, value = torch.randn(3, 2, 6, 7, 2, 8).to(dtype)
    out, lse = natten.na2d(query, key, value, 3, return_lse=True)
    expected = natten.na2d(*(x.double() for x in (query, key, value)), 3, return_lse=True)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-3, atol=1e-3)
    assert out.dtype == dtype
    # half precision may round to the other neighbor of a number that lies in the middle of two
    torch.testing.assert_close(out.double(), expected[0], rtol=torch.finfo(dtype).eps * 0.51, atol=1e-2)
    packed = [x.flatten(1, 2) for x in (query, key, value)]
    assert natten.attention(*packed).dtype == dtype
    with pytest.raises(ValueError, match="8-bit floats have no gradient"):
        natten.na2d(query.requires_grad_(), key, value, 3)
    with pytest.raises(ValueError, match=r"one dtype, got torch\.float16, torch\.float8"):
        natten.na2d(query.detach(), key.half(), value, 3)


@pytest.mark.parametrize("count", [2, 5])
def test_merged_parts_are_the_whole(count: int) -> None:
    query, key, value = leaf(2, 6, 2, 3), leaf(2, 10, 2, 3), leaf(2, 10, 2, 3)
    chunks = zip(key.chunk(count, 1), value.chunk(count, 1), strict=True)
    parts = [softmax_attention(query, *chunk, False, 0.5) for chunk in chunks]
    merged = natten.merge_attentions(*map(list, zip(*parts, strict=True)))
    assert_same(merged, softmax_attention(query, key, value, False, 0.5), [query, key, value])
    with pytest.raises(ValueError, match="outputs must be two or more"):
        natten.merge_attentions([query], [query[..., 0]])


def test_additional_keys_join_every_window_of_grouped_heads() -> None:
    query, key, value = leaf(1, 5, 6, 4, 3), leaf(1, 5, 6, 2, 3), leaf(1, 5, 6, 2, 3)
    more = leaf(1, 7, 2, 3), leaf(1, 7, 2, 3)
    ours = natten.na2d(query, key, value, (5, 6), additional_keys=more[0], additional_values=more[1], return_lse=True)
    keys, values = (torch.cat((x.flatten(1, 2), y), 1) for x, y in zip((key, value), more, strict=True))
    expected = softmax_attention(query.flatten(1, 2), keys, values, False, 3**-0.5)
    flat = ours[0].flatten(1, 2), ours[1].flatten(1, 2)
    assert_same(flat, expected, [query, key, value, *more])


@pytest.mark.skipif(oracle.available() is not None, reason=str(oracle.available()))
@pytest.mark.parametrize("flip", [False, True])
def test_tokens_are_permuted_as_natten_does(flip: bool) -> None:
    from natten.token_permute import token_permute_operation as theirs

    for shape, tile, dilation in (((7,), (2,), (3,)), ((8, 6), (4, 3), None), ((5, 6, 7), (2, 1, 3), (2, 3, 1))):
        x = torch.randn(2, *shape, 2, 3).transpose(0, -1)  # not contiguous
        tokens, layout, class_shape = token_permute_operation(x, tile, dilation, flip)
        expected = theirs(x, tile, dilation, flip, use_torch=True)
        torch.testing.assert_close(tokens, expected[0], rtol=0, atol=0)
        assert (layout, class_shape) == tuple(map(tuple, expected[1:]))
        back = token_unpermute_operation(tokens, shape, tile, dilation, flip)
        torch.testing.assert_close(back, x, rtol=0, atol=0)


class Unfused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return natten.na2d_av(natten.na2d_qk(x, x, 3).softmax(-1), x, 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_fvcore_counts_what_a_window_costs(requires_grad: bool) -> None:
    pytest.importorskip("fvcore")
    layer = natten.NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True).requires_grad_(requires_grad)
    tokens, pairs = 8 * 8, 8 * 8 * 9 * 2
    assert flops.get_flops(layer, torch.randn(1, 8, 8, 16), True) == tokens * 16 * 16 * 4 + pairs * 16
    x = torch.randn(1, 2, 8, 8, 4, requires_grad=requires_grad)
    assert flops.get_flops(Unfused(), x, True) == pairs * 8
    shape = (1, 8, 8, 2, 4)
    assert flops.fna_flop_count(shape, shape, shape, (3, 3), (1, 1), (False, False), True) == 2 * pairs * 8
