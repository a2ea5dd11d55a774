"""Training transformers' DiNAT with transformers' own tools."""

import copy
import json
import os
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

import transformers
from transformers import AutoConfig, AutoModelForImageClassification

from tests.processes import in_processes
from tests.transformers_models import DINAT, SMALL, build, randomized, small

pytestmark = pytest.mark.usefixtures("enabled")


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


def classifier(model_type: str):
    """Without stochastic depth, so that a step is the same again."""
    options = SMALL | {"drop_path_rate": 0.0} | ({"dilations": None} if model_type == "nat" else {})
    return randomized(AutoModelForImageClassification.from_config(AutoConfig.for_model(model_type, **options)))


def train_one_step(folder: str, model, batch: int, accumulated: int, **options) -> list[float]:
    """The loss and the gradient norm that a Trainer reports of one step over 64 images."""
    generator = torch.Generator().manual_seed(0)
    images = [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": n % 10} for n in range(64)]
    arguments = transformers.TrainingArguments(
        output_dir=folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
        max_steps=1, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(copy.deepcopy(model), arguments, train_dataset=images)
    trainer.train()
    return [trainer.state.log_history[0][name] for name in ("loss", "grad_norm")]


def train_as_one_of_two(folder: str, models) -> None:
    torch.distributed.init_process_group("gloo")
    steps = [[train_one_step(folder, model, *split) for split in ((32, 1), (8, 4))] for model in models]
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(steps))
    torch.distributed.destroy_process_group()


def test_a_trainer_takes_the_same_step_whatever_it_accumulates_on_however_many_processes(tmp_path) -> None:
    """A loss that is not divided by the steps and processes gives gradients so many times too large."""
    models = [classifier(model_type) for model_type in ("dinat", "nat")]
    in_processes(2, train_as_one_of_two, str(tmp_path), models)
    for model, both in zip(models, json.loads((tmp_path / "0.json").read_text()), strict=True):
        whole = train_one_step(str(tmp_path), model, 64, 1)
        for step in (train_one_step(str(tmp_path), model, 16, 4), *both):
            assert step == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("model_type", ["dinat", "nat"])
def test_gradient_checkpointing_computes_every_layer_twice_and_takes_the_same_step(tmp_path, model_type: str) -> None:
    model, calls = classifier(model_type), []
    for module in model.modules():
        if isinstance(module, DINAT.NeighborhoodAttention):
            module.register_forward_hook(lambda module, *_: calls.append(module))
    whole = train_one_step(str(tmp_path), model, 64, 1)
    assert len(calls) == 4
    calls.clear()
    assert train_one_step(str(tmp_path), model, 64, 1, gradient_checkpointing=True) == pytest.approx(whole)
    assert len(calls) == 8


@pytest.mark.parametrize("kilobytes", [160, 240])
def test_a_device_map_never_cuts_a_layer(tmp_path, kilobytes: int) -> None:
    model, image = build("DinatForImageClassification"), torch.randn(1, 3, 32, 32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(
        tmp_path, device_map="auto", max_memory={"cpu": f"{kilobytes}KB"}, offload_folder=tmp_path / "offload"
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}  # which together hold 315 kB
    assert not [key for key in loaded.hf_device_map if re.search(r"layers\.\d+\.", key)]
    torch.testing.assert_close(loaded(image).logits, model(image).logits)
