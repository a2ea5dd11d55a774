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


@pytest.mark.parametrize("sizes", [(10,), (4, 6), (3, 1, 2, 4)])
def test_parts_are_the_whole_with_all_gradients(sizes: tuple[int, ...]) -> None:
    keys = sum(sizes)
    query, key, value = (torch.randn(2, n, 3, 4, dtype=torch.float64, requires_grad=True) for n in (5, keys, keys))
    mask = torch.rand(5, keys) < 0.6
    mask[1, :4] = False  # some parts see nothing of a query, and their output is NaN
    mask[0] = mask[0] & False
    seen = mask.any(1)
    up_out, up_lse = torch.randn(2, 5, 3, 4).double(), torch.randn(2, 5, 3).double()

    def run(parts: tuple[int, ...]) -> list[Tensor]:
        pieces = zip(key.split(parts, 1), value.split(parts, 1), mask.split(parts, 1), strict=True)
        out, lse = dt.merge(*zip(*(attention(query, *piece) for piece in pieces), strict=True))
        assert not out[:, ~seen].any()
        assert lse[:, ~seen].isneginf().all()
        terms = (out * up_out).sum() + (lse[:, seen] * up_lse[:, seen]).sum()
        return [out, lse, *torch.autograd.grad(terms, (query, key, value))]

    def whole() -> list[Tensor]:
        out, lse = attention(query[:, seen], key, value, mask[seen])
        terms = (out * up_out[:, seen]).sum() + (lse * up_lse[:, seen]).sum()
        return [out, lse, *torch.autograd.grad(terms, (query, key, value))]

    (out, lse, *grads), (exact_out, exact_lse, *exact) = run(sizes), whole()
    for found, expected in zip((out[:, seen], lse[:, seen], *grads), (exact_out, exact_lse, *exact), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_a_thousand_cuts() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        test_parts_are_the_whole_with_all_gradients(tuple(rng.randint(1, 6) for _ in range(rng.randint(1, 6))))


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([], [], ValueError, "outs must be at least one, with as many lses, got 0 and 0"),
        ([torch.ones(2, 3)], [torch.ones(3)], ValueError, r"lses\[0\] must have shape \(2,\), got \(3,\)"),
        ([torch.ones(2, 3), torch.ones(2, 4)], 2 * [torch.ones(2)], ValueError, r"outs\[1\] .* first, got \(2, 4\)"),
        ([torch.ones(2, 3).long()], [torch.ones(2)], TypeError, r"outs\[0\] .* floating tensors, got torch.int64"),
    ],
)
def test_wrong_parts_say_what_would_be_right(outs: list, lses: list, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        dt.merge(outs, lses)
