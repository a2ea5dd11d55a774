"""transformers' DiNAT on this package's attention: the contract of its classes, and what is built on them."""

import json
import math
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from transformers import AutoBackbone, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from dinat_triton.integrations import nat
from dinat_triton.models.layouts import from_native
from tests.oracles import brute
from tests.transformers_dinat import modeling as repaired_modeling
from tests.transformers_models import CLASSES, DINAT, SMALL, build, first, randomized, small

pytestmark = pytest.mark.usefixtures("enabled")

# ---- the classes -----------------------------------------------------------------------------------------------------


def results(model, image: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """Everything that a model computes, and the gradients of its parameters."""
    outputs = model(image, output_hidden_states=True)
    tensors = [outputs[0]] if isinstance(outputs[0], Tensor) else list(outputs[0])
    tensors += outputs.hidden_states
    sum(x.square().sum() for x in tensors).backward()
    return [x.detach() for x in tensors], [p.grad for p in model.parameters()]


@pytest.mark.parametrize("size", [(64, 64), (72, 44), (20, 36)], ids=["square", "ragged", "padded"])
@pytest.mark.parametrize("name", CLASSES)
def test_outputs_and_gradients_are_those_of_an_independent_repair(name: str, size: tuple[int, int]) -> None:
    ours = build(name)
    theirs = getattr(repaired_modeling(), name)(small()).eval()
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(2, 3, *size)
    (outputs, gradients), (expected, expected_gradients) = results(ours, image), results(theirs, image)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
    for found, exact in zip(gradients, expected_gradients, strict=True):
        if exact is None:
            assert found is None  # of a stage that no feature map needs
        else:
            torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item() + 1e-6)


@pytest.mark.parametrize("size", [(64, 64), (20, 36)], ids=["square", "padded"])
def test_attentions_are_an_output_that_changes_no_other(size: tuple[int, int]) -> None:
    model, image = build("DinatForImageClassification"), torch.randn(2, 3, *size)
    plain, attended = model(image), model(image, output_attentions=True)
    torch.testing.assert_close(attended.logits, plain.logits, rtol=1e-4, atol=1e-5)
    assert plain.attentions is None
    maps = [[(n + 2**level - 1) // 2**level for n in size] for level in (2, 3, 4)]
    assert [list(a.shape) for a in attended.attentions] == [[2, n, *m, 9] for n, m in zip((2, 4, 8), maps, strict=True)]


@pytest.mark.parametrize(("shape", "kernel_size", "dilation"), [((7, 9), 3, 2), ((8, 6), 5, 1), ((13, 12), 3, 4)])
def test_attentions_follow_the_formula(shape: tuple[int, int], kernel_size: int, dilation: int) -> None:
    """Row-major over the window, and over the map before it."""
    layer = randomized(DINAT.NeighborhoodAttention(small(), 16, 2, kernel_size, dilation)).double()
    x = torch.randn(1, *shape, 16, dtype=torch.float64)
    out, attention = layer(x, output_attentions=True)
    query, key, value = (f(x).unflatten(-1, (2, 8)).flatten(1, 2)[0] for f in (layer.query, layer.key, layer.value))
    keys, places = brute.table(shape, (kernel_size,) * 2, (dilation,) * 2, (1, 1), (False, False), ("shift",) * 2)
    logits = torch.einsum("nhd,nkhd->hnk", query, key[keys]) / math.sqrt(8) + layer.rpb.flatten(1)[:, places]
    torch.testing.assert_close(attention[0].flatten(1, 2), logits.softmax(-1))
    expected = torch.einsum("hnk,nkhd->nhd", logits.softmax(-1), value[keys])
    torch.testing.assert_close(out[0].flatten(0, 1), expected.flatten(1))
    torch.testing.assert_close(layer(x)[0], out)
    assert torch.autograd.grad(out.sum(), attention)[0].any()  # the output is computed from it


@pytest.mark.parametrize(("patch_size", "channels"), [(2, 3), (8, 1), ((16, 16), 3), ([4, 4], 1)])
def test_patches_are_those_of_timms_models(patch_size, channels: int) -> None:
    options = {key: SMALL[key] for key in ("embed_dim", "depths", "num_heads", "kernel_size", "dilations", "mlp_ratio")}
    options["patch_size"] = patch_size if isinstance(patch_size, int) else patch_size[0]
    ours = timm.create_model("dinat_mini", **options, in_chans=channels, num_classes=10).eval()
    theirs = build("DinatForImageClassification", small(patch_size=patch_size, num_channels=channels))
    theirs.load_state_dict(from_native(randomized(ours).state_dict(), "transformers")[0])
    image = torch.randn(1, channels, 96, 64)
    torch.testing.assert_close(theirs(image).logits, ours(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 32, [4, 8]])
def test_other_patch_sizes_are_refused(patch_size) -> None:
    with pytest.raises(ValueError, match=rf"patch_size must be 2, 4, 8 or 16, .* got {re.escape(str(patch_size))}"):
        build("DinatModel", small(patch_size=patch_size))


def test_attentions_are_traced_into_one_graph() -> None:
    model = build("DinatModel", small(depths=[1, 1], num_heads=[2, 4], dilations=[[3], [1]]))
    image, options = torch.randn(2, 3, 32, 32), {"output_attentions": True}
    expected = model(image, **options)
    traced = torch.export.export(model, (image,), options, strict=True).module()(image, **options)
    torch.testing.assert_close(traced.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(traced.attentions, expected.attentions)


def test_dropout_is_of_the_probabilities_and_in_training_only() -> None:
    """Its mean is the layer without it, with and without the probabilities as an output."""
    layer = randomized(DINAT.NeighborhoodAttention(small(attention_probs_dropout_prob=0.4), 16, 2, 3, 2))
    x = torch.randn(1, 8, 8, 16)
    expected, probabilities = layer.eval()(x, output_attentions=True)
    torch.testing.assert_close(layer(x)[0], expected)

    layer.train()
    _, dropped = layer(x, output_attentions=True)
    kept = dropped != 0
    assert 0.5 < kept.float().mean() < 0.7
    torch.testing.assert_close(dropped[kept], probabilities[kept] / 0.6)
    many = x.expand(600, -1, -1, -1)
    for attentions in (False, True):
        out = layer(many, output_attentions=attentions)[0]
        assert out.std(0).max() > 0.01
        torch.testing.assert_close(out.mean(0), expected[0], rtol=0.0, atol=0.1)
    layer(x)[0].sum().backward()
    assert layer.rpb.grad.abs().sum() > 0


# ---- folders, Auto classes, pipelines --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_saving_and_loading_changes_nothing(tmp_path, name: str) -> None:
    model, image = build(name), torch.randn(2, 3, 64, 64)
    model.save_pretrained(tmp_path)
    loaded, info = getattr(DINAT, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(first(loaded.eval()(image)), first(model(image)), rtol=0.0, atol=0.0)


def hub_folder(path):
    """A folder as the hub has them: an older config with its traps, a torch file of weights, a preprocessor."""
    config = {key: SMALL[key] for key in ("embed_dim", "depths", "num_heads", "kernel_size", "mlp_ratio")}
    config |= {"model_type": "nat", "hidden_size": 512, "path_norm": True, "layer_scale_init_value": 0.0}
    config["id2label"] = {str(i): f"class {i}" for i in range(10)}
    config["label2id"] = {label: i for i, label in enumerate(config["id2label"].values())}
    source = build("DinatForImageClassification", small(dilations=[[1], [1, 1], [1]]))
    weights = {key.replace("dinat.", "nat."): value for key, value in source.state_dict().items()}
    torch.save(weights, path / "pytorch_model.bin")
    (path / "config.json").write_text(json.dumps(config))
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": {"height": 224, "width": 224},
    }
    preprocessor |= dict.fromkeys(("do_normalize", "do_rescale", "do_resize"), True)
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return source


def test_nat_folders_load_again(tmp_path) -> None:
    """With the sizes that embed_dim says: all published configs say hidden_size 512."""
    source = hub_folder(tmp_path)
    image = torch.randn(2, 3, 64, 64)
    model, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is nat.NatForImageClassification
    assert not any(info.values())
    assert (model.config.dilations, model.config.embed_dim) == ([[1], [1, 1], [1]], 16)
    outputs = model.eval()(image, labels=torch.tensor([0, 1]), output_attentions=True, output_hidden_states=True)
    expected = source(image, labels=torch.tensor([0, 1]), output_attentions=True, output_hidden_states=True)
    for key, value in expected.items():
        torch.testing.assert_close(outputs[key], value)
    plain = model(image, labels=torch.tensor([0, 1]), return_dict=False)
    torch.testing.assert_close(plain[:2], (expected.loss, expected.logits))

    assert type(AutoModel.from_pretrained(tmp_path)) is nat.NatModel
    backbone = nat.NatBackbone.from_pretrained(tmp_path, out_features=["stage1", "stage3"])
    assert [tuple(f.shape) for f in backbone(image).feature_maps] == [(2, 16, 16, 16), (2, 64, 4, 4)]
    assert type(AutoBackbone.from_config(nat.NatConfig())) is nat.NatBackbone

    model.save_pretrained(tmp_path / "again")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    assert {key.split(".")[0] for key in again.state_dict()} == {"nat", "classifier"}
    torch.testing.assert_close(again.eval()(image).logits, expected.logits)


def test_a_nat_has_no_dilation() -> None:
    with pytest.raises(ValueError, match=r"a NAT has no dilation, use a DinatConfig: got dilations=\[\[3\]"):
        nat.NatConfig(**SMALL)


def test_the_pipeline_classifies(tmp_path) -> None:
    hub_folder(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    answers = transformers.pipeline("image-classification", model=str(tmp_path), device="cpu")(picture, top_k=3)
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")
    with torch.no_grad():
        shares = AutoModelForImageClassification.from_pretrained(tmp_path).eval()(**pixels).logits[0].softmax(-1)
    expected = {f"class {i}": pytest.approx(shares[i].item(), abs=1e-5) for i in shares.topk(3).indices}
    assert {answer["label"]: answer["score"] for answer in answers} == expected


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_the_hubs_preprocessor_is_the_squashing_transform(tmp_path, backend: str) -> None:
    """Both resize the whole picture to the square; torchvision's resize rounds by itself, a grey level at most.

    The default transform of our models is the authors' evaluation, which crops the centre: it sees something else.
    """
    hub_folder(tmp_path)
    picture = Image.effect_mandelbrot((310, 270), (-2, -1.3, 1, 1.3), 60).convert("RGB")
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    theirs = processor(picture, return_tensors="pt").pixel_values[0]

    model = timm.create_model("nat_mini", num_classes=10)
    config = timm.data.resolve_data_config(model=model) | {"crop_pct": 1.0, "crop_mode": "squash"}
    ours = timm.data.create_transform(**config)(picture)
    grey_level = 1 / 255 / 0.224
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5 if backend == "pil" else 1.01 * grey_level)
    cropped = timm.data.create_transform(**timm.data.resolve_data_config(model=model))(picture)
    assert cropped.shape == theirs.shape
    assert (cropped - theirs).abs().mean() > 10 * (ours - theirs).abs().mean() + 0.01
