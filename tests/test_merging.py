"""Parts of an attention put together, against attention to all their keys at once."""

import random

import pytest
import torch
from torch import Tensor

import dinat_triton as dt


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Full attention `[batch, length, heads, dim]`; of queries that see nothing the output is NaN, the lse -inf."""
    empty = ~mask.any(1)[:, None]
    logits = torch.einsum("bnhd,bmhd->bnhm", query, key).masked_fill(~mask[:, None] & ~empty[..., None], -torch.inf)
    out = torch.einsum("bnhm,bmhd->bnhd", logits.softmax(-1), value).masked_fill(empty[..., None], torch.nan)
    return out, logits.logsumexp(-1).masked_fill(empty, -torch.inf)


def check(sizes: tuple[int, ...]) -> None:
    keys = sum(sizes)
    leaves = query, key, value = [torch.randn(2, n, 3, 4).double().requires_grad_() for n in (5, keys, keys)]
    mask = torch.rand(5, keys) < 0.6
    mask[1, :4] = False  # some parts see nothing of a query, and their output is NaN
    mask[0] = False
    seen = mask.any(1)
    upstream = torch.randn(2, int(seen.sum()), 3, 4).double(), torch.randn(2, int(seen.sum()), 3).double()
    pieces = zip(*(x.split(sizes, dim) for x, dim in ((key, 1), (value, 1), (mask, 1))), strict=True)
    out, lse = dt.merge(*zip(*(attention(query, *piece) for piece in pieces), strict=True))
    assert not out[:, ~seen].any()
    assert lse[:, ~seen].isneginf().all()
    found, exact = (out[:, seen], lse[:, seen]), attention(query[:, seen], key, value, mask[seen])
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaves, upstream) for x in (found, exact)))


@pytest.mark.parametrize("sizes", [(10,), (4, 6), (3, 1, 2, 4)])
def test_parts_are_the_whole_with_all_gradients(sizes: tuple[int, ...]) -> None:
    check(sizes)


@pytest.mark.slow
def test_a_thousand_cuts() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        check(tuple(rng.randint(1, 6) for _ in range(rng.randint(1, 6))))


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "outs must be at least one, with as many lses, got 0 and 0"),
        ([torch.ones(2, 3)], [torch.ones(3)], r"lses\[0\] must have shape \(2,\), got \(3,\)"),
        ([torch.ones(2, 3), torch.ones(2, 4)], 2 * [torch.ones(2)], r"outs\[1\] .* first, got \(2, 4\)"),
        ([torch.ones(2, 3).long()], [torch.ones(2)], r"outs\[0\] .* floating tensors, got torch.int64"),
    ],
)
def test_wrong_parts_say_what_would_be_right(outs: list, lses: list, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        dt.merge(outs, lses)
