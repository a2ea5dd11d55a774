"""transformers' DiNAT on this package's attention: the contract of its classes, what is built on them, and `enable`."""

import copy
import json
import math
import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from dinat_triton.integrations import nat
from dinat_triton.integrations import transformers as integration
from dinat_triton.integrations.transformers import disable, enable, is_enabled
from tests.oracles import brute
from tests.transformers_dinat import modeling as repaired_modeling

DINAT = integration.load_modeling()
CLASSES = ("DinatModel", "DinatForImageClassification", "DinatBackbone")
SMALL = {
    "embed_dim": 16,
    "depths": [1, 2, 1],
    "num_heads": [2, 4, 8],
    "kernel_size": 3,
    "dilations": [[3], [1, 2], [1]],
    "mlp_ratio": 2.0,
    "num_labels": 10,
    "out_features": ["stage1", "stage2"],
}
# Dilations published for segmentation, with kernel 11.
MASK2FORMER = [[1, 14, 1], [1, 4, 1, 7], [*[1, 2, 1, 3] * 4, 1, 3], [1] * 5]
ONEFORMER = [[1, 20, 1], [1, 5, 1, 10], [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5], [1, 2, 1, 2, 1]]


@pytest.fixture(autouse=True)
def _enabled(request):
    """Enabled for the length of each test, unless it is about enabling."""
    disable()
    with nullcontext() if "disabled" in request.fixturenames else enable():
        yield
    disable()


@pytest.fixture
def disabled():
    """transformers as it comes."""


def small(**changes):
    return transformers.DinatConfig(**(SMALL | changes))


def randomized(model):
    """Biases of the attention start at zero, which would hide them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("rpb"):
                parameter.normal_()
    return model


def build(name: str, config=None):
    return randomized(getattr(DINAT, name)(config or small())).eval()


def first(outputs) -> Tensor:
    """What a model is for: logits, features or the first feature map."""
    value = outputs[0]
    return value[0] if isinstance(value, tuple) else value


# ---- the classes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (72, 44), (20, 36)], ids=["square", "ragged", "padded"])
@pytest.mark.parametrize("name", CLASSES)
def test_outputs_and_gradients_are_those_of_an_independent_repair(name: str, size: tuple[int, int]) -> None:
    ours = build(name)
    theirs = getattr(repaired_modeling(), name)(small()).eval()
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(2, 3, *size)
    grads = []
    for model in (ours, theirs):
        outputs = model(image, output_hidden_states=True)
        tensors = [outputs[0]] if isinstance(outputs[0], Tensor) else list(outputs[0])
        sum(x.square().sum() for x in (*tensors, *outputs.hidden_states)).backward()
        grads.append(([x.detach() for x in (*tensors, *outputs.hidden_states)], [p.grad for p in model.parameters()]))
    for one, other in zip(*(values for values, _ in grads), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for one, other in zip(*(gradients for _, gradients in grads), strict=True):
        if one is None:
            assert other is None  # of a stage that no feature map needs
        else:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item() + 1e-6)


def test_every_parameter_gets_a_gradient_and_the_loss_falls() -> None:
    model = build("DinatForImageClassification", small(drop_path_rate=0.0)).train()
    images, labels = torch.randn(8, 3, 48, 48), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def train_one_step(folder: str, model, batch: int, accumulated: int) -> list[float]:
    """The loss and the gradient norm that a Trainer reports of one step over 64 images."""
    generator = torch.Generator().manual_seed(0)
    images = [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": n % 10} for n in range(64)]
    arguments = transformers.TrainingArguments(
        output_dir=folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
        max_steps=1, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = transformers.Trainer(copy.deepcopy(model), arguments, train_dataset=images)
    trainer.train()
    return [trainer.state.log_history[0][name] for name in ("loss", "grad_norm")]


def train_as_one_of_two(rank: int, folder: str, models) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not live on in a forked process
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    steps = [[train_one_step(folder, model, *split) for split in ((32, 1), (8, 4))] for model in models]
    Path(folder, f"{rank}.json").write_text(json.dumps(steps))
    torch.distributed.destroy_process_group()


def test_a_trainer_takes_the_same_step_whatever_it_accumulates_on_however_many_processes(tmp_path) -> None:
    """A loss that is not divided by the steps and processes gives gradients so many times too large."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    options = SMALL | {"drop_path_rate": 0.0}
    configs = (transformers.DinatConfig(**options), nat.NatConfig(**options | {"dilations": None}))
    models = [randomized(AutoModelForImageClassification.from_config(config)) for config in configs]
    start_processes(train_as_one_of_two, (str(tmp_path), models), nprocs=2, start_method="fork")
    for model, both in zip(models, json.loads((tmp_path / "0.json").read_text()), strict=True):
        whole = train_one_step(str(tmp_path), model, 64, 1)
        for step in (train_one_step(str(tmp_path), model, 16, 4), *both):
            assert step == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_attentions_are_an_output_that_changes_no_other(name: str) -> None:
    model, image = build(name), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain, attended = model(image), model(image, output_attentions=True)
    torch.testing.assert_close(first(attended), first(plain), rtol=1e-4, atol=1e-5)
    assert plain.attentions is None
    assert [tuple(a.shape) for a in attended.attentions] == [(2, 2, 16, 16, 9), (2, 4, 8, 8, 9), (2, 8, 4, 4, 9)]
    for attention in attended.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


@pytest.mark.parametrize(("shape", "kernel_size", "dilation"), [((7, 9), 3, 2), ((8, 6), 5, 1), ((13, 12), 3, 4)])
def test_attentions_follow_the_formula(shape: tuple[int, int], kernel_size: int, dilation: int) -> None:
    """Row-major over the window, and over the map before it."""
    layer = randomized(DINAT.NeighborhoodAttention(small(), 16, 2, kernel_size, dilation)).double()
    x = torch.randn(1, *shape, 16, dtype=torch.float64)
    out, attention = layer(x, output_attentions=True)
    query, key, value = (f(x).unflatten(-1, (2, 8)).flatten(1, 2) for f in (layer.query, layer.key, layer.value))
    hoods = brute.neighborhoods(shape, (kernel_size,) * 2, (dilation,) * 2, (1, 1), (False, False))
    for token, (keys, pairs) in enumerate(hoods):
        at = (0, slice(None), token // shape[1], token % shape[1])
        bias = torch.stack([layer.rpb[(slice(None), *pair)] for pair in pairs], -1)
        logits = torch.einsum("hd,khd->hk", query[0, token], key[0, keys]) / math.sqrt(8) + bias
        torch.testing.assert_close(attention[at], logits.softmax(-1))
        expected = torch.einsum("hk,khd->hd", logits.softmax(-1), value[0, keys]).flatten()
        torch.testing.assert_close(out[0, token // shape[1], token % shape[1]], expected)
    torch.testing.assert_close(layer(x)[0], out)


def test_hidden_states_are_the_stem_and_each_stage_after_its_downsampling() -> None:
    image = torch.randn(2, 3, 64, 48)
    outputs = build("DinatModel")(image, output_hidden_states=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [
        (2, 16, 12, 16),
        (2, 8, 6, 32),
        (2, 4, 3, 64),
        (2, 4, 3, 64),
    ]
    for plain, reshaped in zip(outputs.hidden_states, outputs.reshaped_hidden_states, strict=True):
        torch.testing.assert_close(reshaped, plain.permute(0, 3, 1, 2))
    assert outputs.last_hidden_state.shape == (2, 4, 3, 64)
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state.mean((1, 2)))


def test_feature_maps_are_the_stages_before_their_downsampling() -> None:
    image = torch.randn(2, 3, 64, 64)
    backbone = build("DinatBackbone")
    outputs = backbone(image, output_hidden_states=True)
    assert [tuple(f.shape) for f in outputs.feature_maps] == [(2, 16, 16, 16), (2, 32, 8, 8)]
    assert backbone.channels == [16, 32]
    for stage, norm in enumerate(backbone.hidden_states_norms.values(), 1):
        expected = norm(outputs.hidden_states[stage]).permute(0, 3, 1, 2)
        torch.testing.assert_close(outputs.feature_maps[stage - 1], expected)
    last = build("DinatBackbone", small(out_features=None))
    assert [tuple(f.shape) for f in last(image).feature_maps] == [(2, 64, 4, 4)]


@pytest.mark.parametrize("name", CLASSES)
def test_tuples_hold_what_the_named_outputs_hold(name: str) -> None:
    model, image = build(name), torch.randn(2, 3, 32, 32)
    options = {"output_hidden_states": True, "output_attentions": name != "DinatBackbone"}
    named = {k: v for k, v in model(image, **options).items() if k not in ("reshaped_hidden_states", "attentions")}
    plain = model(image, **options, return_dict=False)
    for one, other in zip(named.values(), plain, strict=False):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", CLASSES)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    model, images = build(name), torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        together = first(model(images))
        alone = torch.cat([first(model(image[None])) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_greyscale_images() -> None:
    model = build("DinatForImageClassification", small(num_channels=1))
    assert model(torch.randn(2, 1, 64, 64)).logits.shape == (2, 10)
    with pytest.raises(ValueError, match="channel dimension"):
        model(torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("attentions", [False, True])
def test_export_and_compile(attentions: bool) -> None:
    model, image = build("DinatModel"), torch.randn(2, 3, 32, 32)
    options = {"output_attentions": attentions}
    with torch.no_grad():
        expected = model(image, **options)
        exported = torch.export.export(model, (image,), options, strict=attentions).module()(image, **options)
        compiled = torch.compile(model, backend="eager", fullgraph=True)(image, **options)
    for outputs in (exported, compiled):
        torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state)
        torch.testing.assert_close(outputs.attentions, expected.attentions)


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


def test_auto_classes(tmp_path) -> None:
    build("DinatForImageClassification").save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is DINAT.DinatModel
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is DINAT.DinatForImageClassification
    assert type(AutoBackbone.from_config(small())) is DINAT.DinatBackbone


def hub_folder(path, model_type: str = "nat", **changes):
    """A folder as the hub has them: an older config with its traps, a torch file of weights, a preprocessor."""
    config = {key: SMALL[key] for key in ("embed_dim", "depths", "num_heads", "kernel_size", "mlp_ratio")}
    config |= {"model_type": model_type, "hidden_size": 512, "path_norm": True, "layer_scale_init_value": 0.0} | changes
    config["id2label"] = {str(i): f"class {i}" for i in range(10)}
    config["label2id"] = {label: i for i, label in enumerate(config["id2label"].values())}
    source = build("DinatForImageClassification", small(dilations=changes.get("dilations") or [[1], [1, 1], [1]]))
    weights = {key.replace("dinat.", f"{model_type}."): value for key, value in source.state_dict().items()}
    torch.save(weights, path / "pytorch_model.bin")
    (path / "config.json").write_text(json.dumps(config))
    preprocessor = {
        "feature_extractor_type": "ViTFeatureExtractor",
        "image_processor_type": "ViTImageProcessor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": {"height": 224, "width": 224},
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return source


def test_nat_folders_load_again(tmp_path) -> None:
    source = hub_folder(tmp_path)
    image = torch.randn(2, 3, 64, 64)
    model, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is nat.NatForImageClassification
    assert not any(info.values())
    assert model.config.dilations == [[1], [1, 1], [1]]
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


def test_sizes_come_from_embed_dim_whatever_hidden_size_says(tmp_path) -> None:
    """All published configs say 512."""
    source = hub_folder(tmp_path, "dinat", dilations=SMALL["dilations"])
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.embed_dim) == (512, 16)
    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(image).logits, source(image).logits)


def test_a_folder_without_weights_is_reported(tmp_path) -> None:
    hub_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(OSError, match=r"no file named .*pytorch_model\.bin"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_type", ["nat", "dinat"])
def test_the_pipeline_classifies(tmp_path, model_type: str) -> None:
    hub_folder(tmp_path, model_type)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    answers = transformers.pipeline("image-classification", model=str(tmp_path), device="cpu")(picture, top_k=3)
    assert len(answers) == 3
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")
    with torch.no_grad():
        logits = AutoModelForImageClassification.from_pretrained(tmp_path).eval()(**pixels).logits[0]
    assert answers[0]["label"] == f"class {logits.argmax()}"
    assert answers[0]["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)


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


# ---- segmentation ----------------------------------------------------------------------------------------------------


def backbone_config(dilations):
    return transformers.DinatConfig(
        embed_dim=8,
        depths=[len(level) for level in dilations],
        num_heads=[1, 2, 4, 8],
        kernel_size=11,
        dilations=dilations,
        mlp_ratio=1.0,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def maskformer(dilations):
    decoder = transformers.DetrConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=5,
    )  # fmt: skip
    config = transformers.MaskFormerConfig(
        fpn_feature_size=32,
        mask_feature_size=32,
        backbone_config=backbone_config(dilations),
        decoder_config=decoder,
        num_labels=4,
    )
    return transformers.MaskFormerForInstanceSegmentation(config), {}


def mask2former(dilations):
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone_config(dilations),
        **{name: 32 for name in ("feature_size", "mask_feature_size", "hidden_dim")},
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        train_num_points=64,
        num_labels=4,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config), {}


def oneformer(dilations):
    config = transformers.OneFormerConfig(
        backbone_config=backbone_config(dilations),
        **{name: 64 for name in ("conv_dim", "mask_dim", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward")},
        text_encoder_width=64,
        text_encoder_context_length=8,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=32,
        text_encoder_n_ctx=4,
        task_seq_len=8,
        encoder_layers=1,
        decoder_layers=2,
        query_dec_layers=1,
        num_attention_heads=2,
        num_queries=9,
        train_num_points=64,
        num_labels=4,
        is_training=True,
    )
    words = {"task_inputs": torch.randint(0, 32, (1, 8)), "text_inputs": torch.randint(0, 32, (1, 5, 8))}
    return transformers.OneFormerForUniversalSegmentation(config), words


def check_segmenter(make, dilations, size: int) -> None:
    model, words = make(dilations)
    image = torch.randn(1, 3, size, size)
    masks = (torch.rand(2, size, size) > 0.5).float()
    outputs = model.train()(image, mask_labels=[masks], class_labels=[torch.tensor([0, 2])], **words)
    outputs.loss.backward()
    assert outputs.masks_queries_logits.shape[-2:] == (size // 4, size // 4)
    assert outputs.loss.isfinite()
    rpbs = {name: p for name, p in model.named_parameters() if name.endswith("rpb")}
    assert len(rpbs) == sum(map(len, dilations))
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in rpbs.values())


@pytest.mark.parametrize("make", [maskformer, mask2former, oneformer])
def test_segmenters_train_on_a_dinat(make) -> None:
    """Smaller than the window on every level but for the first layer, so that all the rest is padded."""
    check_segmenter(make, [[1, 2], [1], [2], [1]], 64)


@pytest.mark.parametrize("size", [512, 640])
@pytest.mark.parametrize(
    ("make", "dilations"), [(maskformer, MASK2FORMER), (mask2former, MASK2FORMER), (oneformer, ONEFORMER)]
)
def test_segmenters_train_with_published_dilations(make, dilations, size: int) -> None:
    check_segmenter(make, dilations, size)


# ---- enable ----------------------------------------------------------------------------------------------------------


def test_enabling_is_idempotent_and_reversible(disabled) -> None:
    forward, check = DINAT.NeighborhoodAttention.forward, DINAT.requires_backends
    disable()  # nothing to do
    enable()
    ours = DINAT.NeighborhoodAttention.forward
    with enable(), enable():
        assert DINAT.NeighborhoodAttention.forward is ours is not forward
    assert is_enabled()
    assert "nat" in transformers.CONFIG_MAPPING
    disable()
    assert not is_enabled()
    assert (DINAT.NeighborhoodAttention.forward, DINAT.requires_backends) == (forward, check)
    assert "nat" not in transformers.CONFIG_MAPPING
    with enable():
        assert is_enabled()
    assert not is_enabled()
    with pytest.raises(RuntimeError, match=r"NatModel runs on transformers' DiNAT, .* until .*enable\(\) is called"):
        nat.NatModel(nat.NatConfig())


def test_models_that_exist_change_too(disabled, monkeypatch) -> None:
    monkeypatch.setattr(DINAT, "requires_backends", lambda *arguments: None)
    model, image = DINAT.DinatModel(small()), torch.randn(1, 3, 32, 32)
    with pytest.raises(transformers.utils.OptionalDependencyNotAvailable):
        model(image)
    with enable():
        assert model(image).last_hidden_state.isfinite().all()


def test_other_requirements_stay(disabled, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(DINAT, "requires_backends", lambda _, backends: asked.append(backends))
    with enable():
        DINAT.requires_backends(DINAT.DinatModel, ["natten", "timm"])
        DINAT.requires_backends(DINAT.DinatModel, "timm")
    assert asked == [["timm"], ["timm"]]


@pytest.mark.parametrize(
    ("forward", "difference"),
    [
        (lambda self, hidden_states, **kwargs: None, "its forward takes"),
        (lambda self, hidden_states, output_attentions=False: self.na2d(hidden_states), "na2d"),
    ],
)
def test_code_that_is_not_known_is_refused(disabled, monkeypatch, forward, difference: str) -> None:
    monkeypatch.setattr(DINAT.NeighborhoodAttention, "forward", forward)
    with pytest.raises(RuntimeError, match=rf"(?s)transformers {transformers.__version__} is not .*{difference}"):
        enable()
    assert DINAT.NeighborhoodAttention.forward is forward
    assert not is_enabled()
    assert "nat" not in transformers.CONFIG_MAPPING


def test_versions_that_are_too_old_are_refused(disabled, monkeypatch) -> None:
    # transformers imports itself a second time under its own name, so that `transformers` here can be the first.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(RuntimeError, match=r"must be 5\.14 or newer .* got 4\.57\.1"):
        enable()


HIDE = """
import importlib.machinery
found = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] == {name!r} else found(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""
RUN = """
import torch
from transformers import AutoModel, DinatConfig, DinatModel
config = DinatConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], kernel_size=3, dilations=[[2], [1]])
assert DinatModel(config).eval()(torch.randn(1, 3, 32, 32)).last_hidden_state.isfinite().all()
assert type(AutoModel.from_config(config)) is DinatModel
"""


def run(code: str, path=None) -> None:
    """Runs code in a process of its own: what is imported first matters here."""
    prefix = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    done = subprocess.run(
        [sys.executable, "-c", prefix + textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_natten_and_after_a_failure() -> None:
    run(
        HIDE.format(name="natten")
        + """
from transformers import DinatConfig, DinatModel
try:
    DinatModel(DinatConfig())
except ImportError as error:
    assert "requires the natten library" in str(error)
else:
    raise AssertionError("transformers' own DiNAT runs: nothing is left to repair")
from dinat_triton.integrations.transformers import enable
enable()
"""
        + RUN
        + "import sys; assert 'natten' not in sys.modules"
    )


@pytest.mark.parametrize("fails_first", [False, True])
def test_with_an_incompatible_natten(tmp_path, fails_first: bool) -> None:
    """One that lacks the functions that transformers imports, as all since 0.17.5."""
    (tmp_path / "natten").mkdir()
    (tmp_path / "natten" / "__init__.py").write_text("__version__ = '0.21.7'")
    (tmp_path / "natten" / "functional.py").touch()
    attempt = """
try:
    from transformers import DinatModel
except ImportError as error:
    assert "cannot import name 'natten2dav'" in str(error)
else:
    raise AssertionError("transformers' own DiNAT is imported: nothing is left to repair")
"""
    enabling = "from dinat_triton.integrations.transformers import enable\nenable()\n"
    run((attempt if fails_first else "") + enabling + RUN, tmp_path)


def test_without_transformers() -> None:
    run(
        HIDE.format(name="transformers")
        + """
import dinat_triton, sys
import dinat_triton.integrations.transformers as integration
import dinat_triton.integrations.natten, dinat_triton.integrations.natten_0_14
try:
    integration.enable()
except ImportError as error:
    assert "pip install 'dinat-triton[transformers]'" in str(error)
else:
    raise AssertionError("enabled what is not there")
"""
    )


def test_importing_the_package_imports_no_transformers() -> None:
    run("import dinat_triton, dinat_triton.integrations.natten, sys\nassert 'transformers' not in sys.modules")
