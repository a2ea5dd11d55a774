"""The modules: padding as published, options, parameters, and what they say to wrong input."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

import dinat_triton as dt

MODULES = {1: dt.NeighborhoodAttention1D, 2: dt.NeighborhoodAttention2D, 3: dt.NeighborhoodAttention3D}


def by_hand(module: dt.NeighborhoodAttention2D, x: Tensor, kernel: int, dilation: int) -> Tensor:
    """Padding, projection, attention in the reference, crop and projection as separate steps."""
    _, height, width, channels = x.shape
    span = kernel * dilation
    x = pad(x, (0, 0, 0, max(0, span - width), 0, max(0, span - height)))
    query, key, value = (y.unflatten(-1, (module.num_heads, -1)) for y in module.qkv(x).chunk(3, -1))
    out = dt.na2d(query, key, value, kernel, dilation=dilation, rpb=module.rpb, backend="reference")
    return module.proj(out.reshape(*x.shape[:-1], channels)[:, :height, :width])


@pytest.mark.parametrize(("height", "width"), [(12, 13), (5, 13), (5, 4), (1, 1)])
def test_small_maps_are_padded_before_the_projection_and_cropped_after(height: int, width: int) -> None:
    module = dt.NeighborhoodAttention2D(12, 3, 3, dilation=2, rel_pos_bias=True)
    torch.nn.init.normal_(module.qkv.bias)  # padded tokens have these keys and values, and are seen
    x = torch.randn(2, height, width, 12)
    torch.testing.assert_close(module(x), by_hand(module, x, 3, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_state_keys_and_shapes(rank: int) -> None:
    module = MODULES[rank](8, 2, kernel_size=3, rel_pos_bias=True)
    shapes = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    proj = {"proj.weight": (8, 8), "proj.bias": (8,)}
    assert shapes == {"rpb": (2, *[5] * rank), "qkv.weight": (24, 8), "qkv.bias": (24,)} | proj
    assert set(MODULES[rank](8, 2, qkv_bias=False).state_dict()) == {"qkv.weight", *proj}
    out = module(torch.randn(2, *(4, 5, 3)[:rank], 8))
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_dropout_acts_in_training_only() -> None:
    module = dt.NeighborhoodAttention2D(8, 2, 3, attn_drop=0.5)
    x = torch.randn(1, 6, 6, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_options_reach_the_op() -> None:
    module = dt.NeighborhoodAttention2D(
        8, 2, (3, 4), stride=(1, 2), dilation=(2, 1), is_causal=(False, True), qk_scale=0.2
    )
    x = torch.randn(1, 7, 6, 8)
    query, key, value = (y.unflatten(-1, (2, 4)) for y in module.qkv(x).chunk(3, -1))
    options = {"stride": (1, 2), "dilation": (2, 1), "is_causal": (False, True), "scale": 0.2}
    out = dt.na2d(query, key, value, (3, 4), **options, backend="reference")
    torch.testing.assert_close(module(x), module.proj(out.flatten(-2)), rtol=1e-5, atol=1e-6)
    assert "kernel_size=(3, 4), stride=(1, 2), dilation=(2, 1), is_causal=(0, 1)" in repr(module)


def test_device_and_dtype_reach_every_parameter() -> None:
    module = dt.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    assert module(torch.empty(1, 4, 4, 8, device="meta", dtype=torch.bfloat16)).shape == (1, 4, 4, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide embed_dim 8, got 3"),
        ({"num_heads": 0}, "num_heads must divide embed_dim 8, got 0"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be one integer or one per axis"),
        ({"stride": 8}, "stride must not exceed kernel_size 7, got 8 on axis 0"),
        ({"attn_drop": 1.0}, "attn_drop must be at least 0 and below 1, got 1.0"),
    ],
)
def test_wrong_options_say_what_would_be_right(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dt.NeighborhoodAttention2D(**({"embed_dim": 8, "num_heads": 2} | options))


@pytest.mark.parametrize("shape", [(4, 4, 8), (1, 8, 4, 4)])  # no batch, channels first
def test_a_wrong_layout_says_what_would_be_right(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must be \[batch, 2 map axes, 8 channels\], got shape"):
        dt.NeighborhoodAttention2D(8, 2, 3)(torch.randn(shape))
