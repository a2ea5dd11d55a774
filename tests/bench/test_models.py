"""Whole models: what is measured beside what, what fails how, and what the tables say."""

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from dinat_triton import cli
from dinat_triton.bench import memory, models
from dinat_triton.bench.harness import Results
from dinat_triton.bench.models import EAGER, INFERENCE, TRAINING, Case

SWIN = "swin_tiny_patch4_window7_224"
CASE = Case("dinat_mini", INFERENCE, EAGER, 1, "cpu", False)


def test_runtimes_are_measured_beside_eager(capsys: pytest.CaptureFixture) -> None:
    words = ["--device", "cpu", "--passes", INFERENCE, "--models", "test_vit", "--seconds", "0.05", "--no-memory"]
    assert cli.main(["bench", "models", *words, "--runtimes", "pt2"]) == 0
    table = capsys.readouterr().out
    assert "test_vit pt2" in table


def test_a_training_step_changes_the_weights() -> None:
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), torch.randn(3, 3, 2, 2)
    before = model[1].weight.detach().clone()
    models.step_of(model, images, TRAINING, autocast=False)()
    assert not torch.equal(before, model[1].weight)
    out = models.step_of(model.eval(), images, INFERENCE, autocast=True)()
    assert isinstance(out, torch.Tensor)
    assert out.dtype == torch.bfloat16


def test_what_fails_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that only wait; dinat_tiny fails, and so does the memory of a training step."""

    def prepare(case: Case):
        if case.name == "dinat_tiny":
            raise RuntimeError("cannot\nbecause")
        return lambda: time.sleep(0.004 if case.name == SWIN else 0.001)

    def peak_memory(case: Case) -> int:
        if case.pass_ == TRAINING:
            raise OSError("no /proc")
        return 2 << 20

    monkeypatch.setattr(models, "prepare", prepare)
    monkeypatch.setattr(models, "peak_memory", peak_memory)
    out = tmp_path / "models.json"
    arguments = ["--models", SWIN, "dinat_mini", "dinat_tiny", "--device", "cpu", "--seconds", "0.02", "-o", str(out)]
    assert cli.main(["bench", "models", *arguments]) == 1
    printed = capsys.readouterr().out
    assert "- dinat_tiny, inference, float32: RuntimeError: cannot" in printed
    assert "- memory of dinat_mini, training: OSError: no /proc" in printed
    found = {(r.implementation, r.pass_): r for r in Results.load(out).records}
    assert len(found) == 6
    assert found["dinat_mini", INFERENCE].also["peak_bytes"] == 2 << 20
    assert found["dinat_mini", INFERENCE].also["first_call_ms"] >= 1


def peak_of_three() -> int:
    return memory.resident_peak(lambda: [torch.ones(8 << 20).sum() for _ in range(3)])


def test_a_peak_is_what_was_live_at_once() -> None:
    assert 0.9 < memory.in_fresh_process(peak_of_three) / (32 << 20) < 1.3
