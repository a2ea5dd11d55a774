"""Counts of floating-point operations against published ones, and against pairs counted one by one."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import dinat_triton as dt
from dinat_triton.flops import EVALUATED
from dinat_triton.models.variants import VARIANTS
from dinat_triton.plan import Plan
from dinat_triton.tiled import choose_tile

# Millions of parameters, as published.
QUICK = {
    "dinat_mini": 19.984,
    "nat_small": 50.743,
    "dinat_large_384_11x11": 201.144,
    "dinat_s_tiny": 28.288,
    "dinat_isotropic_base": 86.466,
}
MODELS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name not in QUICK)]


@pytest.mark.parametrize("name", MODELS)
def test_models_count_as_published(name: str) -> None:
    """The tables of models print the published counts, of which layer norms are a part."""
    model = timm.create_model(name, device="meta").eval()
    image = torch.empty(1, *model.default_cfg["input_size"], device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert counter.get_total_flops() / 2e9 == pytest.approx(VARIANTS[name].gmacs, rel=0.005, abs=0.05)
    millions = round(sum(p.numel() for p in model.parameters()) / 1e6, 3)
    assert millions == QUICK.get(name, millions)


@pytest.mark.parametrize("packed", [False, True])
def test_an_op_counts_its_pairs(packed: bool) -> None:
    heads, kv_heads, dim, value_dim = (4, 4, 8, 8) if packed else (4, 2, 8, 6)
    geometry = dt.Geometry((13, 11), (3, 3), dilation=(2, 1), is_causal=(True, False))
    channels = [(3, heads, dim)] if packed else [(heads, dim), (kv_heads, dim), (kv_heads, value_dim)]
    qkv = [torch.randn(2, 13, 11, *c, requires_grad=True) for c in channels]
    pairs = int((geometry.neighbors()[0] >= 0).sum())
    tile = choose_tile(geometry, 2, heads)
    for mapping, scores in ((None, pairs), (EVALUATED, Plan(geometry, tile).cost().scores)):
        with FlopCounterMode(display=False, custom_mapping=mapping) as forward:
            out = torch.ops.dinat_triton.na(qkv, [3, 3, 1, 1, 2, 1, 1, 0, 0, 0], None, None, 0.0, False, "tiled")[0]
        with FlopCounterMode(display=False, custom_mapping=mapping) as backward:
            out.sum().backward()
        assert forward.get_total_flops() == 2 * 2 * heads * scores * (dim + value_dim)
        assert backward.get_total_flops() == 2 * 2 * heads * scores * (3 * dim + 2 * value_dim)


def test_kernels_evaluate_padded_tiles() -> None:
    qkv = torch.empty(2, 7, 7, 3, 4, 32, device="meta", dtype=torch.bfloat16)
    window, options = [7, 7, 1, 1, 1, 1, 0, 0, 0, 0], (0.2, 0.0, True, "triton")
    with FlopCounterMode(display=False, custom_mapping=EVALUATED) as forward:
        out, lse = torch.ops.dinat_triton.fused([qkv], None, None, window, *options)
    with FlopCounterMode(display=False, custom_mapping=EVALUATED) as backward:
        options = (*options[:2], options[3])
        torch.ops.dinat_triton.fused_backward([qkv], None, None, out, lse, out, None, window, *options)
    assert forward.get_total_flops() == 2 * 2 * 4 * 64 * 64 * (32 + 32)
    assert backward.get_total_flops() == 5 * forward.get_total_flops() // 2
