"""The model family: sizes, options, features, initialisation, training."""

import math
from copy import deepcopy

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import nn

SMALL = dict(embed_dim=32, depths=(1, 2, 2, 1), num_classes=10)


def small(name="dinat_mini", **options):
    torch.manual_seed(0)
    return timm.create_model(name, **(SMALL | options))


def dilations_of(model):
    return [[block.attn.window[4] for block in level.blocks] for level in model.levels]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nat_mini", [[1] * 3, [1] * 4, [1] * 6, [1] * 5]),
        ("dinat_mini", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5]),
        ("dinat_large_384", [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]),
        ("dinat_large_384_11x11", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]),
        ("dinat_s_tiny", [[1, 8], [1, 4], [1, 2] * 3, [1, 1]]),
        ("dinat_isotropic_base", [[1], [2]] * 6),
    ],
)
def test_published_dilations_are_the_largest_that_fit(name, expected):
    model = timm.create_model(name, device="meta")
    assert dilations_of(model) == expected
    if not name.startswith("nat"):
        size = model.default_cfg["input_size"][-1]
        assert dilations_of(timm.create_model(name, device="meta", dilations="auto", img_size=size)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("coco", [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1]]),
        ("ade20k", [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4] * 3, [1, 2, 1, 2, 1]]),
        ("ade20k_640", [[1, 20, 1], [1, 5, 1, 10], [1, 2, 1, 3, 1, 4, 1, 5] * 2 + [1, 5], [1, 2, 1, 2, 1]]),
        ("mask2former", [[1, 14, 1], [1, 4, 1, 7], [1, 2, 1, 3] * 4 + [1, 3], [1] * 5]),
    ],
)
def test_dilations_of_dense_prediction_are_a_keyword_away(name, expected):
    assert dilations_of(timm.create_model("dinat_tiny", dilations=name, device="meta")) == expected


@pytest.mark.parametrize(
    ("options", "image"),
    [
        (dict(patch_size=2), (3, 32, 48)),
        (dict(patch_size=8), (3, 64, 64)),
        (dict(patch_size=16), (3, 128, 128)),
        (dict(in_chans=1), (1, 32, 32)),
        (dict(kernel_size=5, dilations="auto", img_size=(64, 96)), (3, 64, 96)),
        (dict(dilations=[[1, 2], 1, [(1, 3), 1], 2], depths=(2, 1, 2, 1)), (3, 64, 64)),
        (dict(depths=(1, 1), num_heads=(2, 4), qkv_bias=False, layer_scale=1e-3), (3, 32, 32)),
        (dict(global_pool="max", num_classes=3, drop_block_rate=0.0), (3, 32, 32)),
        (dict(name="dinat_s_tiny"), (3, 97, 131)),
    ],
)
def test_options(options, image):
    found = small(**options).eval()(torch.randn(2, *image))
    assert found.shape == (2, options.get("num_classes", 10))
    assert found.isfinite().all()


def test_isotropic_options():
    model = timm.create_model("dinat_isotropic_small", depth=4, dilations="auto", img_size=448, device="meta")
    assert dilations_of(model) == [[1], [4]] * 2
    model = timm.create_model("dinat_isotropic_small", depth=2, embed_dim=64, patch_size=8, num_classes=5)
    assert model(torch.randn(1, 3, 60, 50)).shape == (1, 5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(dilations=[[1], [1]]), r"dilations must hold .* depths \(1, 2, 2, 1\)"),
        (dict(dilations=[[1], [1, 2, 3], [1, 1], [1]]), r"dilations must hold .* \[1, 2, 3\]"),
        (dict(dilations="auto"), "pass img_size"),
        (dict(dilations="pascal"), "'coco'.*'pascal'"),
        (dict(patch_size=6), "patch_size must be 2, 4, 8 or 16, got 6"),
        (dict(num_heads=(1, 2)), "num_heads must have one value per level"),
        (dict(num_heads=(3, 3, 3, 3)), "num_heads must divide embed_dim"),
        (dict(window_size=7), "window_size"),
        (dict(weight_init="zeros"), "weight_init"),
        (dict(drop_block_rate=0.1), "drop_block_rate .* use drop_path_rate; got 0.1"),
    ],
)
def test_refused_options(options, says):
    with pytest.raises((ValueError, TypeError), match=says):
        small(**options)


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (3, 64, 64), (1, 3, 64, 31)])
def test_refused_images(shape):
    with pytest.raises(ValueError, match=r"image must be (\[batch, 3, height, width\]|at least 32 x 32), got"):
        small()(torch.randn(shape))


def test_features_in_either_format():
    x = torch.randn(1, 3, 97, 131)
    nhwc = small(features_only=True).eval()(x)
    nchw = small(features_only=True, output_fmt="NCHW").eval()(x)
    assert [f.shape[-1] for f in nhwc] == [32, 64, 128, 256]
    assert [tuple(f.shape[1:3]) for f in nhwc] == [(25, 33), (13, 17), (7, 9), (4, 5)]
    for a, b in zip(nhwc, nchw, strict=True):
        torch.testing.assert_close(a.permute(0, 3, 1, 2), b)
    some = small(features_only=True, out_indices=(1, 3))
    assert (some.feature_info.channels(), some.feature_info.reduction()) == ([64, 256], [8, 32])
    torch.testing.assert_close(some.eval()(x)[0], nhwc[1])


def test_features_have_norms_of_their_own():
    x = torch.randn(2, 3, 64, 64)
    model = small(features_only=True, feature_norms=True, output_fmt="NCHW", out_indices=(1, 2, 3))
    features = model(x)
    for feature in features:
        torch.testing.assert_close(feature.mean(1), torch.zeros_like(feature[:, 0]), atol=1e-5, rtol=0)
    sum(f.pow(2).sum() for f in features).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert sum("feature_norms" in n for n, _ in model.named_parameters()) == 4  # of levels 1 and 2; 3 has the final one
    pruned = small(features_only=True, feature_norms=True, out_indices=(0, 1)).eval()
    whole = small(feature_norms=True).eval()
    expected = whole.forward_intermediates(x, indices=[0, 1], norm=True, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(pruned(x), expected)


def test_initialisation_is_the_authors_and_repeatable():
    options = dict(depths=(1, 1, 1, 1))
    later, model = timm.create_model("dinat_mini", device="meta", **options), timm.create_model("dinat_mini", **options)
    later.to_empty(device="cpu").init_weights()
    for name, parameter in [*later.named_parameters(), *model.named_parameters()]:
        if name.endswith(".rpb") or (parameter.ndim == 2 and name.endswith("weight")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            assert parameter.mean().abs().item() < 5 * 0.02 / math.sqrt(parameter.numel()), name
        elif "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif parameter.ndim == 1 and "patch_embed.proj" not in name:
            assert (parameter == 0).all(), name
        else:
            assert parameter.isfinite().all(), name
    for each in (later, model):
        torch.manual_seed(3)
        each.init_weights()
    torch.testing.assert_close(later.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert timm.create_model("nat_small", device="meta").levels[0].blocks[0].ls1.init_values == 1e-5


def test_gradient_checkpointing_changes_nothing():
    model = small(drop_path_rate=0.0)
    x = torch.randn(2, 3, 48, 64)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_low_precision():
    model = small().eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(x)
    low = deepcopy(model).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    for found in (autocast.float(), low.float()):
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("name", ["dinat_mini", "dinat_s_tiny"])
def test_every_parameter_gets_a_gradient_under_autocast(name):
    model = small(name, layer_scale=0.1, drop_path_rate=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(2, 3, 64, 64)).float().square().mean()
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not 0 < p.grad.abs().sum() < math.inf] == []


def test_drop_path_rises_linearly():
    model = small(drop_path_rate=0.5)
    blocks = [block for level in model.levels for block in level.blocks]
    assert isinstance(blocks[0].drop_path1, nn.Identity)
    for drop_path in ("drop_path1", "drop_path2"):
        rates = [getattr(block, drop_path).drop_prob for block in blocks[1:]]
        assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    x = torch.randn(4, 3, 64, 64)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_parameter_groups():
    model = small()
    assert {name for name, _ in model.named_parameters() if name.endswith("rpb")} == model.no_weight_decay()
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    order = ["patch_embed.norm.weight", "levels.0.blocks.0.attn.rpb", "levels.1.downsample.norm.weight"]
    order += ["levels.1.blocks.1.mlp.fc1.bias", "levels.3.blocks.0.norm1.weight", "norm.weight"]
    assert sorted(order, key=layers.get) == order
    assert layers["levels.1.downsample.norm.weight"] == layers["levels.1.blocks.0.norm1.weight"]
    assert len(set(layers.values())) == 6 + 2  # a layer per block, the stem, and the rest
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert max(scales) == 1.0
    assert min(scales) == pytest.approx(0.75 ** (len(scales) - 1))
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert not any(name.endswith(("rpb", "bias")) or "norm" in name for name in decayed)
