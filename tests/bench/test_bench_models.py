"""Whole models: what is measured beside what, what the tables and targets say, and what fails how."""

import math
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

from dinat_triton import cli
from dinat_triton.bench import harness, models
from dinat_triton.bench.harness import Record, Timing
from dinat_triton.bench.models import COMPILED, EAGER, GRAPH, INFERENCE, TRAINING, Case

SWIN = "swin_tiny_patch4_window7_224"


def parsed(*arguments: str) -> Namespace:
    parser = ArgumentParser()
    models.configure(parser)
    return parser.parse_args(arguments)


def case(name: str = "dinat_mini", **changed) -> Case:
    options = {
        "pass_": INFERENCE,
        "mode": EAGER,
        "batch": 1,
        "device": "cpu",
        "autocast": False,
        "channels_last": False,
    }
    return Case("tiny", name, **options | changed)


def record(
    name: str, ms: float | None, peak: int | None = None, *, pass_: str = INFERENCE, mode: str = EAGER
) -> Record:
    timing = None if ms is None else Timing(ms, ms, ms, 9)
    also = {} if peak is None else {"peak_bytes": peak, "first_call_ms": 7.0}
    problem = {"group": "tiny", "batch": 1, "mode": mode}
    return Record(problem, name, INFERENCE, "float32", timing, None if ms else "RuntimeError: no", also=also)


# What is measured


def test_stages_begin_with_what_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = parsed("--device", "cuda", "--models", "dinat_mini", "--graph", "--compile", "dinat_mini")
    stages = models.find_stages(options)
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


def test_by_default_a_group_is_measured_eager() -> None:
    stages = models.find_stages(parsed("--device", "cpu"))
    assert [[c.name for c in stage] for stage in stages] == [list(models.GROUPS["tiny"])] * 2
    assert {(c.mode, c.batch, c.autocast) for stage in stages for c in stage} == {(EAGER, 1, False)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_graphs_need_a_gpu(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["bench", "models", "--graph"]) == 2
    assert "CUDA graphs need a GPU" in capsys.readouterr().err


def test_a_training_step_changes_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    images = torch.randn(3, 3, 2, 2)
    before = model[1].weight.detach().clone()
    models.step_of(model, images, TRAINING, autocast=False)()
    assert not torch.equal(before, model[1].weight)
    out = models.step_of(model.eval(), images, INFERENCE, autocast=True)()
    assert isinstance(out, torch.Tensor)
    assert out.dtype == torch.bfloat16
    assert out.is_inference()


@pytest.fixture
def tiny_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that only wait; dinat_tiny fails."""

    def prepare(case: Case):
        if case.name == "dinat_tiny":
            raise RuntimeError("cannot\nbecause")
        return lambda: time.sleep(0.002 if case.name == SWIN else 0.001)

    monkeypatch.setattr(models, "prepare", prepare)
    monkeypatch.setattr(models, "peak_memory", lambda case: 2 << 20)


@pytest.mark.usefixtures("tiny_steps")
def test_what_fails_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "models.json"
    arguments = ["--models", "dinat_mini", "dinat_tiny", "--device", "cpu", "--seconds", "0.02", "--out", str(out)]
    assert cli.main(["bench", "models", *arguments]) == 1
    printed = capsys.readouterr().out
    assert "- dinat_tiny, inference, float32: RuntimeError: cannot" in printed
    assert "dinat_mini inference at least 1.4x the speed" in printed
    found = {(r.implementation, r.pass_): r for r in harness.load_records(out)}
    assert len(found) == 6
    assert found[SWIN, TRAINING].also["peak_bytes"] == 2 << 20
    assert found["dinat_mini", INFERENCE].also["first_call_ms"] >= 1


@pytest.mark.usefixtures("tiny_steps")
def test_after_the_deadline_nothing_is_begun() -> None:
    (found,) = models.measure([case()], 0.01, time.monotonic() - 1, True, lambda text: None)
    assert (found.timing, found.reason, found.also) == (None, models.TIME_IS_UP, {})


def test_memory_that_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(case: Case) -> int:
        raise RuntimeError("no /proc")

    monkeypatch.setattr(models, "prepare", lambda case: lambda: None)
    monkeypatch.setattr(models, "peak_memory", fail)
    records = models.measure([case()], 0.0, math.inf, True, lambda text: None)
    assert records[0].timing
    assert "- memory of dinat_mini, inference: RuntimeError: no /proc" in models.report(records)


@pytest.mark.slow
def test_a_small_model_is_measured_in_earnest(tmp_path: Path) -> None:
    out = tmp_path / "models.json"
    arguments = ["--models", "dinat_mini", "--device", "cpu", "--seconds", "0.1", "--channels-last", "--out", str(out)]
    assert cli.main(["bench", "models", *arguments]) == 0
    records = harness.load_records(out)
    assert all(r.timing and r.also["peak_bytes"] > 1 << 20 and r.also["first_call_ms"] > 0 for r in records)
    assert all(r.problem["layout"] == "channels last" for r in records)


# What is said about it


def test_speed_and_memory_are_against_the_reference() -> None:
    records = [record(SWIN, 20.0, 100), record("dinat_mini", 10.0, 50), record("dinat_mini", 5.0, mode=COMPILED)]
    lines = models.report(records).splitlines()
    assert lines[3].split() == ["dinat_mini", "100.0", "2.00", "0", "0.50", "7"]
    assert lines[4].split() == ["dinat_mini", "compile", "200.0", "4.00", "-", "-", "-"]


@pytest.mark.parametrize(("ms", "met"), [(10.0, True), (14.2, True), (14.4, False)])
def test_targets_are_judged_by_the_reference(ms: float, met: bool) -> None:
    records = [record(SWIN, 20.0), record("dinat_mini", ms), record("dinat_mini", 1.0, mode=COMPILED)]
    assert [v["met"] for v in models.judge(records, "cpu")] == [met]


def test_memory_has_a_target_on_a_gpu() -> None:
    records = [record(SWIN, 20.0, 100), record("dinat_tiny", 10.0, 61)]
    for each in records:
        each.problem["batch"] = 64
    assert [v["met"] for v in models.judge(records, "cuda")] == [True, False]


def test_committed_results_make_a_report() -> None:
    for path in sorted((harness.ROOT / "bench" / "results").glob("*/models.json")):
        records = harness.load_records(path)
        assert "swin_tiny_patch4_window7_224" in models.report(records)
        assert len(models.judge(records, "cpu")) == 2


def test_an_old_timm_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    import timm

    monkeypatch.setattr(timm, "is_model", lambda name: False)
    monkeypatch.setattr(timm, "__version__", "0.9")
    assert cli.main(["bench", "models", "--device", "cpu"]) == 2
    assert "the models need timm >= 1.0.31, and this is 0.9" in capsys.readouterr().err
