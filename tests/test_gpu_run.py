"""What can be tried of the GPU bench without a GPU: arguments, tables, and the whole script in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinat_triton.bench import gpu, harness
from dinat_triton.bench.harness import Record, Timing

SCRIPT = harness.ROOT / "bench" / "gpu_run.sh"
PROBLEM = gpu.problem_of(gpu.layers_of("dinat_mini@224")[0], 128, "dinat_mini@224")


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHON": sys.executable}
    return subprocess.run(["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["--bogus"], ["--out"]])
def test_wrong_arguments_are_named(arguments: list[str]) -> None:
    done = run_script(*arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run(tmp_path: Path) -> None:
    done = run_script("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "torch sees no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_dry_run_passes_every_part(tmp_path: Path) -> None:
    done = run_script("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout
    checked = json.loads((tmp_path / "check.json").read_text())["layers"]
    assert all(not layer["wrong"] and layer["repeats"] for layer in checked)
    assert harness.load(tmp_path / "layers.json")["records"]
    assert "memcheck   ok" in (tmp_path / "table.txt").read_text()


def test_the_report_tells_times_ratios_and_reasons(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    work = gpu.work(PROBLEM, gpu.FORWARD, 2, 4e12)
    records = [
        Record(PROBLEM.to_dict(), gpu.OURS, gpu.FORWARD, "bfloat16", Timing(0.1, 0.1, 0.1, 9),
               work=work | {"fraction_of_floor": 0.5}),
        Record(PROBLEM.to_dict(), "flex", gpu.FORWARD, "bfloat16", Timing(0.4, 0.4, 0.4, 9)),
        Record(PROBLEM.to_dict(), "natten", gpu.FORWARD, "bfloat16", reason="not installed"),
    ]  # fmt: skip
    harness.add_ratios(records, gpu.OURS)
    limits = {"copy_bytes_per_s": 4e12, "bf16_flops_per_s": 8e14}
    harness.save(tmp_path / "layers.json", harness.environment("cpu"), records, ceilings=limits)
    assert gpu.main(["report", "--dry-run", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "100.0" in out
    assert "50%" in out
    assert "4.00" in out
    assert "- natten: not installed" in out
    assert "flex: 4.00x our time" in out


def test_a_report_of_nothing_fails(tmp_path: Path) -> None:
    assert gpu.main(["report", "--dry-run", "--out", str(tmp_path)]) == 1


def test_the_floor_counts_four_tensors_forward_and_eight_backward() -> None:
    tensor = 128 * 2 * 56 * 56 * 32 * 2
    assert gpu.work(PROBLEM, gpu.FORWARD, 2, 1e12)["bytes"] == 4 * tensor
    assert gpu.work(PROBLEM, gpu.BACKWARD, 2, 1e12)["bytes"] == 8 * tensor


def test_a_wrong_result_is_seen() -> None:
    truth = {"out": torch.ones(4, dtype=torch.float64)}
    assert gpu.errors({"out": torch.full((4,), torch.nan)}, truth)["out"] != 0
    assert not gpu.errors({"out": torch.full((4,), torch.nan)}, truth)["out"] <= 1
    assert gpu.errors({"out": torch.full((4,), 2.0)}, truth)["out"] == pytest.approx(1)
