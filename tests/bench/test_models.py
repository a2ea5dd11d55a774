"""Whole models: what is measured beside what, what fails how, and what the tables say."""

import pytest
import torch
from torch import nn

from dinat_triton import cli
from dinat_triton.bench import memory, models
from dinat_triton.bench.models import INFERENCE, TRAINING
from dinat_triton.bench.runtimes import RUNTIMES


def test_runtimes_are_measured_beside_eager(capsys: pytest.CaptureFixture) -> None:
    words = ["--device", "cpu", "--passes", INFERENCE, "--models", "test_vit", "--seconds", "0.05", "--no-memory"]
    assert cli.main(["bench", "models", *words, "--runtimes", "pt2"]) == 0
    table = capsys.readouterr().out
    assert "test_vit pt2" in table


def test_a_runtime_leaves_the_model_alone() -> None:
    model, images = nn.Linear(4, 2), torch.randn(1, 4)
    for name in ("bfloat16", "int8"):
        RUNTIMES[name](model, images)()
    assert [x.dtype for x in (*model.parameters(), images)] == [torch.float32] * 3


def test_a_training_step_changes_the_weights() -> None:
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), torch.randn(3, 3, 2, 2)
    before = model[1].weight.detach().clone()
    models.step_of(model, images, TRAINING, autocast=False)()
    assert not torch.equal(before, model[1].weight)
    out = models.step_of(model.eval(), images, INFERENCE, autocast=True)()
    assert isinstance(out, torch.Tensor)
    assert out.dtype == torch.bfloat16


def peak_of_three() -> int:
    return memory.resident_peak(lambda: [torch.ones(8 << 20).sum() for _ in range(3)])


def test_a_peak_is_what_was_live_at_once() -> None:
    assert 0.9 < memory.in_fresh_process(peak_of_three) / (32 << 20) < 1.3
