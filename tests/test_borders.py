"""What borders mean, in terms of other operations. That every backend does so, the tests of random geometries show."""

import random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import dinat_triton as dt
from tests.oracles import sampling
from tests.oracles.cases import check, make_case

BACKENDS = ("reference", "tiled")


def leaves(*shape: int) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def with_gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    return [*outputs, *torch.autograd.grad(outputs[0], inputs, upstream)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_map_that_wraps_around_has_no_place_to_begin(backend: str, is_causal: bool) -> None:
    """Rolled inputs give rolled outputs and gradients; along an axis that clips they do not."""
    inputs, rpb, upstream = leaves(2, 8, 9, 2, 4), torch.randn(2, 7, 5).double(), torch.randn(2, 8, 9, 2, 4).double()

    def run(border: str, shift: int) -> list[Tensor]:
        rolled = [x.roll((3, shift), (1, 2)) for x in inputs]
        window = {"kernel_size": (4, 3), "dilation": (2, 3), "is_causal": is_causal, "border": ("wrap", border)}
        out = dt.na2d(*rolled, **window, rpb=rpb, backend=backend)
        return with_gradients((out.roll((-3, -shift), (1, 2)),), inputs, upstream)

    for found, expected in zip(run("wrap", 4), run("wrap", 0), strict=True):
        torch.testing.assert_close(found, expected)
    assert not torch.allclose(run("clip", 4)[0], run("clip", 0)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [3, 4, 11])  # the last is larger than the map
def test_clipped_windows_are_a_band_of_full_attention(backend: str, kernel: int) -> None:
    inputs, upstream = leaves(2, 9, 2, 4), torch.randn(2, 9, 2, 4).double()
    behind = torch.arange(9) - torch.arange(9)[:, None]
    band = (behind >= -(kernel // 2)) & (behind < kernel - kernel // 2)
    full = scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs), attn_mask=band).transpose(1, 2)
    ours = dt.na1d(*inputs, kernel, border="clip", backend=backend)
    for found, expected in zip(*(with_gradients((x,), inputs, upstream) for x in (ours, full)), strict=True):
        torch.testing.assert_close(found, expected)


def test_modules_pad_where_windows_shift_and_nowhere_else() -> None:
    x = torch.randn(1, 5, 4, 8)
    module = dt.NeighborhoodAttention2D(8, 2, 3, dilation=2, rel_pos_bias=True, border="clip")
    query, key, value = module.qkv(x).unflatten(-1, (3, 2, 4)).unbind(-3)
    out = dt.na2d(query, key, value, 3, dilation=2, rpb=module.rpb, border="clip", backend="reference")
    torch.testing.assert_close(module(x), module.proj(out.flatten(-2)))
    with pytest.raises(ValueError, match=r"3 \* 2 = 6 exceeds length 4 of axis 1; use a dilation of at most 1, or bor"):
        dt.NeighborhoodAttention2D(8, 2, 3, dilation=(1, 2), border="wrap")(x)


def test_a_graph_for_all_sizes_wraps_those_it_can() -> None:
    compiled = torch.compile(lambda x: dt.na1d(x, x, x, 3, dilation=2, border="wrap"), backend="eager", dynamic=True)
    for length in (8, 14):
        x = torch.randn(1, length, 1, 4)
        torch.testing.assert_close(compiled(x), dt.na1d(x, x, x, 3, dilation=2, border="wrap"))
    with pytest.raises(Exception, match="dilation must divide the length of an axis that wraps around, got 2"):
        compiled(torch.randn(1, 9, 1, 4))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(10))
def test_a_thousand_geometries_match_brute_force(chunk: int) -> None:
    rng = random.Random(chunk)
    for sample in sampling.samples(100, seed=1000 + chunk, max_tokens=60, borders=("shift", "clip", "wrap")):
        check(make_case(sample, rng), torch.float64, 1e-12, *BACKENDS, truth="brute")
