"""Whole models: what is measured beside what, what fails how, and what the tables say."""

import time
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from torch import nn

from dinat_triton import cli
from dinat_triton.bench import memory, models
from dinat_triton.bench.harness import Record, Results, Timing
from dinat_triton.bench.models import COMPILED, EAGER, GRAPH, INFERENCE, TRAINING, Case

SWIN = "swin_tiny_patch4_window7_224"
CASE = Case("dinat_mini", INFERENCE, EAGER, 1, "cpu", False)


def test_stages_begin_with_what_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parser = ArgumentParser()
    models.configure(parser)
    words = ["--device", "cuda", "--models", SWIN, "dinat_mini", "--graph", "--compile", "dinat_mini"]
    stages = models.stages_of(parser.parse_args(words))
    found = [[(c.name, c.pass_, c.mode, c.batch) for c in stage] for stage in stages]
    assert found == [
        [(SWIN, INFERENCE, EAGER, 64), ("dinat_mini", INFERENCE, EAGER, 64)],
        [(SWIN, TRAINING, EAGER, 64), ("dinat_mini", TRAINING, EAGER, 64)],
        [(SWIN, INFERENCE, EAGER, 1), ("dinat_mini", INFERENCE, EAGER, 1), (SWIN, INFERENCE, GRAPH, 1),
         ("dinat_mini", INFERENCE, GRAPH, 1)],
        [("dinat_mini", INFERENCE, COMPILED, 64)],
        [("dinat_mini", TRAINING, COMPILED, 64)],
    ]  # fmt: skip
    assert all(c.autocast for stage in stages for c in stage)


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


def test_speed_and_memory_are_against_the_first_model() -> None:
    def record(name: str, ms: float, peak: int | None, mode: str = EAGER) -> Record:
        also = {} if peak is None else {"peak_bytes": peak, "first_call_ms": 7.0}
        return Record({"batch": 1, "mode": mode}, name, INFERENCE, "float32", Timing(ms, ms, ms, 9), also=also)

    records = [record(SWIN, 20.0, 100), record("dinat_mini", 10.0, 50), record("dinat_mini", 5.0, None, COMPILED)]
    rows = [models.row(each, records[0]) for each in records]
    assert rows[1] == ["dinat_mini", "100.0", "2.00", "0", "0.50", "7"]
    assert rows[2] == ["dinat_mini compile", "200.0", "4.00", "-", "-", "-"]
