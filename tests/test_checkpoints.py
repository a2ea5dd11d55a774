"""Checkpoints: every layout both ways, loading them, and refusing what is none; equality with transformers."""

import logging
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from dinat_triton.cli import main
from dinat_triton.models import checkpoints
from dinat_triton.models.checkpoints import check_complete, checkpoint_filter_fn, read_checkpoint, to_native
from dinat_triton.models.layouts import LAYOUTS, from_native
from tests.transformers_dinat import modeling

SMALL = dict(embed_dim=32, depths=(1, 2, 2, 1), num_classes=10)


def randomize(model, seed=0):
    """Weights that leave no layer without effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1 if parameter.ndim == 1 else 0.02, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model.eval()


def small(name="dinat_mini", seed=0, **options):
    options = SMALL | options
    declared = dict(num_classes=options["num_classes"])
    return randomize(timm.create_model(name, pretrained_cfg_overlay=declared, **options), seed)


def saved(folder, model, layout="original", name="saved.pth"):
    checkpoints.save_state_dict(from_native(model.state_dict(), layout)[0], folder / name)
    return folder / name


def config_of(model, **options):
    from transformers import DinatConfig

    first = model.levels[0].blocks[0]
    scale = getattr(first.ls1, "init_values", 0.0)
    return DinatConfig(
        embed_dim=model.feature_info[0]["num_chs"],
        depths=[len(level.blocks) for level in model.levels],
        num_heads=[level.blocks[0].attn.num_heads for level in model.levels],
        kernel_size=first.attn.window[0],
        dilations=[[block.attn.window[4] for block in level.blocks] for level in model.levels],
        mlp_ratio=first.mlp.fc1.out_features / first.mlp.fc1.in_features,
        layer_scale_init_value=scale,
        num_labels=model.num_classes,
        **options,
    )


assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)
WHOLE = ["dinat_mini", "dinat_base", "dinat_large_384_11x11", "nat_base"]


@pytest.mark.parametrize(
    ("name", "size", "depths"),
    [
        ("dinat_mini", (97, 131), (2, 2, 2, 1)),  # blocks of each kind, so that this ends soon
        ("dinat_base", (160, 192), (2, 1, 2, 1)),
        *(pytest.param(name, (224, 224), (3, 4, 6, 5), marks=pytest.mark.slow) for name in WHOLE),
    ],
)
def test_equals_transformers(name, size, depths):
    model = randomize(timm.create_model(name, depths=depths))
    theirs = modeling().DinatForImageClassification(config_of(model)).eval()
    theirs.load_state_dict(from_native(model.state_dict(), "transformers")[0])
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(x, output_hidden_states=True)
        features, stages = model.forward_intermediates(x, output_fmt="NHWC")
        logits = model.forward_head(features)
    assert (logits - expected.logits).abs().max() < 1e-5
    stem, *hidden = expected.hidden_states  # after each stage's downsampling
    downsampled = [level.downsample(stage) for level, stage in zip(model.levels[1:], stages, strict=False)]
    ours = [model.patch_embed(x), *downsampled, stages[-1]]
    for found, wanted in zip(ours, [stem, *hidden], strict=True):
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_equals_transformers_backbone():
    stages = ["stage1", "stage2", "stage3", "stage4"]
    model = small(feature_norms=True, num_classes=0)
    theirs = modeling().DinatBackbone(config_of(model, out_features=stages)).eval()
    theirs.load_state_dict(from_native(model.state_dict(), "backbone")[0])
    x = torch.randn(1, 3, 97, 131)
    with torch.no_grad():
        expected = theirs(x).feature_maps
        found = model.forward_intermediates(x, norm=True, intermediates_only=True)
    torch.testing.assert_close(found, list(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer_scale", [None, 0.5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_exact(layout, layer_scale):
    is_backbone = LAYOUTS[layout].is_backbone
    options = dict(num_classes=0, feature_norms=True) if is_backbone else {}
    tensors = small(layer_scale=layer_scale, **options).state_dict()
    translated, left_out = from_native(tensors, layout)
    assert left_out == []
    back = to_native(translated)
    assert back.layout == layout
    assert_same(back.tensors, tensors)
    check_complete(back.tensors)
    assert_same(from_native(back.tensors, layout)[0], translated)


@pytest.mark.parametrize("name", ["dinat_s_tiny", "dinat_isotropic_small"])
def test_round_trip_of_other_families(name):
    options = dict(depth=3, embed_dim=64, num_classes=10) if "isotropic" in name else SMALL
    tensors = randomize(timm.create_model(name, **options)).state_dict()
    translated, _ = from_native(tensors, "original")
    assert any(key.startswith("layers.0.") for key in translated)
    assert_same(to_native(translated).tensors, tensors)
    check_complete(tensors)
    with pytest.raises(ValueError, match="there is no layout 'transformers' of"):
        from_native(tensors, "transformers")


def test_detection_checkpoint_leaves_the_rest_of_the_detector():
    tensors = small(feature_norms=True, num_classes=0).state_dict()
    detector, _ = from_native(tensors, "detection")
    detector |= {"neck.lateral_convs.0.conv.weight": torch.zeros(1), "roi_head.bbox_head.fc_cls.bias": torch.zeros(1)}
    checkpoint = to_native({"meta": {"epoch": 36}, "state_dict": detector})
    assert_same(checkpoint.tensors, tensors)
    assert checkpoint.left_out == ["neck.lateral_convs.0.conv.weight", "roi_head.bbox_head.fc_cls.bias"]


def test_loads_a_checkpoint_with_norms_into_features(tmp_path):
    source = small(feature_norms=True, num_classes=0)
    overlay = dict(file=str(saved(tmp_path, source, "oneformer", "model.bin")))
    options = dict(num_classes=0, features_only=True, feature_norms=True, pretrained=True)
    model = timm.create_model("dinat_mini", pretrained_cfg_overlay=overlay, **SMALL | options).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = source.forward_intermediates(x, norm=True, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(model(x), expected)


def test_local_dir_and_hf_hub(monkeypatch, tmp_path):
    source = small()
    timm.models.save_for_hf(source, tmp_path, model_args=SMALL, safe_serialization=True)
    assert_same(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).state_dict(), source.state_dict())
    for download in ("hf_hub_download", "download_from_hf"):
        monkeypatch.setattr(
            f"timm.models._hub.{download}", lambda _=None, filename=None, **options: tmp_path / filename
        )
    assert_same(timm.create_model("hf-hub:someone/model", pretrained=True).state_dict(), source.state_dict())
    # the same folder with the weights in the authors' layout
    (tmp_path / "model.safetensors").unlink()
    torch.save(from_native(source.state_dict(), "original")[0], tmp_path / "pytorch_model.bin")
    assert_same(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).state_dict(), source.state_dict())


def test_another_kernel_classes_and_channels(tmp_path, caplog):
    source, options = small(), SMALL | dict(num_classes=4, in_chans=1, kernel_size=5)
    overlay = dict(file=str(saved(tmp_path, source)), num_classes=10)
    with caplog.at_level(logging.INFO):
        model = timm.create_model("dinat_mini", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    rpb = source.state_dict()["levels.1.blocks.0.attn.rpb"]
    expected = nn.functional.interpolate(rpb[None], size=(9, 9), mode="bicubic")[0]
    assert torch.equal(model.levels[1].blocks[0].attn.rpb, expected)
    assert "Resampled levels.1.blocks.0.attn.rpb from (13, 13) to (9, 9)" in caplog.text
    stem = source.patch_embed.proj[0].weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.patch_embed.proj[0].weight, stem)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 4)
    again = timm.create_model("dinat_mini", **options)
    checkpoints.load_checkpoint(again.eval(), read_checkpoint(saved(tmp_path, small(num_classes=4))))
    torch.testing.assert_close(again.patch_embed.proj[0].weight, stem)


def test_training_checkpoints_are_unwrapped(tmp_path):
    source, ema = small(), small(seed=1)
    path = tmp_path / "last.pth.tar"
    wrapped = {f"module.{key}": tensor for key, tensor in source.state_dict().items()}
    torch.save({"state_dict": wrapped, "state_dict_ema": ema.state_dict(), "epoch": 3}, path)
    checkpoints.load_checkpoint(model := small(seed=2), read_checkpoint(path))
    assert_same(model.state_dict(), ema.state_dict())
    assert_same(to_native({"state_dict": wrapped}).tensors, source.state_dict())


def without(part):
    return lambda model: {key: tensor for key, tensor in model.state_dict().items() if part not in key}


SWIN = "swin_tiny_patch4_window7_224"
REFUSED = {
    "no patch embedding": lambda _: timm.create_model("resnet10t").state_dict(),
    "relative_position_bias_table": lambda _: timm.create_model(SWIN, depths=(1, 1), num_heads=(1, 2)).state_dict(),
    "not a state dict: it holds epoch, weights": lambda _: {"epoch": 3, "weights": "x"},
    "it holds nothing": lambda _: {},
    r"nat_mini or dinat_mini \(embed_dim 64, .*an unpublished size \(embed_dim 32, .*\d+ unknown": (
        lambda _: timm.create_model("nat_mini", num_classes=10).state_dict()
    ),
    "with layer scale.*without layer scale": lambda _: small(layer_scale=1.0).state_dict(),
    "classifier of 5 classes, the model one of 10.*num_classes=5": lambda _: small(num_classes=5).state_dict(),
    "no classifier, the model one of 10": lambda _: small(num_classes=0).state_dict(),
    "1 missing: levels.2.blocks.1.mlp.fc2.bias": without("levels.2.blocks.1.mlp.fc2.bias"),
    "lacks levels.1.blocks.0": without("levels.1."),
    "unknown keys: .*query.weight": lambda model: without("0.attention.self.key.weight")(
        modeling().DinatForImageClassification(config_of(model))
    ),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(says):
    model = small()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        checkpoint_filter_fn(REFUSED[says](model), model)
    assert_same(model.state_dict(), before)


def test_another_kind_of_model_and_an_incomplete_one_are_refused():
    model = small()
    with pytest.raises(ValueError, match="model must be a NAT or DiNAT, got a ResNet"):
        checkpoints.fit(model.state_dict(), timm.create_model("resnet10t", device="meta"))
    with pytest.raises(ValueError, match=r"incomplete or inconsistent: 1 missing: levels.2.blocks.1.mlp.fc2.bias"):
        check_complete(without("levels.2.blocks.1.mlp.fc2.bias")(model))


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_truncated_files_are_refused(tmp_path, name):
    path = saved(tmp_path, small(), name=name)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"cannot read .*{name}: it is truncated.*Fetch it again"):
        read_checkpoint(path)


def test_files_that_run_code_are_refused(tmp_path):
    torch.save({"state_dict": small().state_dict(), "hook": Path()}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="holds Python objects"):
        checkpoints.read_file(tmp_path / "model.pth")
    with pytest.raises(FileNotFoundError, match="no such checkpoint file"):
        checkpoints.read_file(tmp_path / "other.pth")


RPB, FC1 = "levels.0.blocks.0.attn.rpb", "levels.0.blocks.0.mlp.fc1.weight"
HOSTILE = {
    "levels.3000000000": lambda t: {"levels.3000000000.blocks.0.attn.rpb": torch.ones(1, 13, 13)},
    "lacks levels.4.blocks.0": lambda t: {"levels.9999.blocks.0.attn.rpb": torch.ones(1, 13, 13)},
    "lacks levels.0.blocks.1": lambda t: {"levels.0.blocks.9999.attn.rpb": torch.ones(1, 13, 13)},
    "501 blocks": lambda t: {f"levels.0.blocks.{j}.attn.rpb": t[RPB].clone() for j in range(1, 496)},
    "shape ()": lambda t: {FC1: torch.tensor(1.0)},
    "shape (0, 0)": lambda t: {RPB: torch.zeros(0, 0)},
    "3 axes": lambda t: {RPB: torch.zeros(13)},
    "num_heads": lambda t: {RPB: torch.zeros(5, 13, 13)},
    "torch.quint8": lambda t: {FC1: torch.quantize_per_tensor(t[FC1], 0.1, 0, torch.quint8)},
    "torch.bool": lambda t: {FC1: t[FC1] > 0},
    "torch.complex64": lambda t: {FC1: t[FC1].to(torch.complex64)},
    "no dense tensor": lambda t: {FC1: t[FC1].to_sparse()},
    "share memory": lambda t: {FC1: torch.zeros(1, 1).expand(1 << 20, 1 << 20)},
    "holds NaN": lambda t: {FC1: t[FC1] * torch.nan},
    "two tensors for levels.0": lambda t: {f"module.{FC1}": t[FC1].clone()},
    "two final norms": lambda t: {f"feature_norms.3.{p}": torch.ones(256) for p in ("weight", "bias")},
    "unknown keys": lambda t: {f"\x1b[2J{'x' * 10_000}\n": torch.ones(1)},
    "holds 7": lambda t: {7: torch.ones(1)},
}


@pytest.mark.parametrize("says", HOSTILE)
def test_hostile_checkpoints_are_refused_in_a_line(tmp_path, capsys, says):
    tensors = small().state_dict()
    tensors |= HOSTILE[says](tensors)
    torch.save(tensors, tmp_path / "a.pth")
    start = time.monotonic()
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.pth")]) == 2
    assert time.monotonic() - start < 20
    message = capsys.readouterr().err
    assert says in message
    assert message.count("\n") == 1
    assert len(message) < 1000
    assert message.rstrip("\n").isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_file_that_unpacks_to_more_than_it_is_refused(tmp_path):
    torch.save(small().state_dict() | {"x": torch.zeros(1 << 20)}, tmp_path / "stored.pth")
    with zipfile.ZipFile(tmp_path / "stored.pth") as stored, zipfile.ZipFile(tmp_path / "bomb.pth", "w", 8) as bomb:
        for name in stored.namelist():
            bomb.writestr(name, stored.read(name))
    with pytest.raises(ValueError, match="unpacks to more bytes"):
        read_checkpoint(tmp_path / "bomb.pth")


@pytest.mark.parametrize("target", ["transformers", "backbone"])
def test_convert_there_and_back_changes_nothing_and_says_what_it_leaves_out(tmp_path, capsys, target):
    expected = small().state_dict()
    middle, back = tmp_path / f"{target}.safetensors", tmp_path / "back.pth"
    assert main(["convert", str(saved(tmp_path, small())), str(middle), "--to", target]) == 0
    assert ("left out: head.fc.weight, head.fc.bias" in capsys.readouterr().out) == (target == "backbone")
    assert main(["convert", str(middle), str(back)]) == 0
    if target == "backbone":
        expected = {key: tensor for key, tensor in expected.items() if not key.startswith("head")}
    assert_same(checkpoints.read_file(back), expected)


def test_convert_makes_a_folder_for_timm(tmp_path, capsys):
    source = randomize(timm.create_model("nat_mini"))
    path = saved(tmp_path, source, "nat", "nat.bin")
    assert main(["convert", str(path), str(tmp_path / "folder"), "--model", "nat_mini"]) == 0
    loaded = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)  # its config.json names the model
    assert_same(loaded.state_dict(), source.state_dict())
    assert main(["convert", str(path), str(tmp_path / "other")]) == 2
    assert "--model" in capsys.readouterr().err
