"""What can be tried of the GPU bench without a GPU: arguments, tables, and the whole script in the interpreter."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinat_triton.bench import gpu, harness, ops
from dinat_triton.bench.harness import BACKWARD, FORWARD, Record, Timing

BASH = shutil.which("bash") or "bash"
SCRIPT = harness.ROOT / "bench" / "gpu_run.sh"
BUILD = harness.ROOT / "bench" / "build_natten.sh"
PROBLEM = gpu.problem_of("dinat_mini", gpu.layers_of("dinat_mini@224")[0], 128)
CEILINGS = {
    "copy_bytes_per_s": 4e12,
    "product_flops_per_s": {"float32": 6e13, "bfloat16": 8e14},
    "exps_per_s": 4e12,
}


def run_script(*arguments: str, script: Path = SCRIPT, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHON": sys.executable}
    return subprocess.run([BASH, script, *arguments], env=environment | variables, capture_output=True, text=True)


@pytest.mark.parametrize("script", [SCRIPT, BUILD])
@pytest.mark.parametrize("arguments", [["--bogus"], ["--out"]])
def test_wrong_arguments_are_named(script: Path, arguments: list[str]) -> None:
    done = run_script(*arguments, script=script)
    assert done.returncode == 2
    assert arguments[0] in done.stderr


def test_natten_is_not_built_without_its_tools(tmp_path: Path) -> None:
    done = run_script("--out", str(tmp_path / "out"), script=BUILD, PATH="")
    assert (done.returncode, done.stderr) == (2, "build_natten.sh: needs uv\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run(tmp_path: Path) -> None:
    done = run_script("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "torch sees no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_script_ends_within_eight_minutes() -> None:
    """The sum of what every part may take at most on a GPU, and of what the budgets within them leave."""
    text = SCRIPT.read_text()
    most = dict(re.findall(r'\bpart (\S+) (\d+) "', text) + re.findall(r"\b(timeout) (\d+) ", text))
    parts = ["tests", "check", '"$tool"', "tune", "time", "models", "first-call", "overhead", "timeout"]
    assert list(most) == parts
    seconds = {name: int(n) for name, n in most.items()}
    assert sum(seconds.values()) + seconds['"$tool"'] <= 470


@pytest.mark.slow
def test_a_dry_run_passes_every_part(tmp_path: Path) -> None:
    done = run_script("--dry-run", "--out", str(tmp_path), DINAT_TRITON_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout
    checked = json.loads((tmp_path / "check.json").read_text())["layers"]
    assert all(not layer["wrong"] and layer["repeats"] for layer in checked)
    for name in ("layers", "models", "first_call", "overhead"):
        assert any(record.timing for record in harness.load_records(tmp_path / f"{name}.json"))
    table = (tmp_path / "table.txt").read_text()
    parts = ("tests", "check", "memcheck", "racecheck", "tune", "time", "models", "first-call", "overhead")
    assert [line.split()[:2] for line in table.splitlines()[-9:]] == [[part, "ok,"] for part in parts]
    # On a GPU the tuned table comes on top of these.
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) <= 7


@pytest.mark.slow
def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    """A Python in which timm is too old for the models, and a folder in the way of a result."""
    fake = tmp_path / "fake" / "timm"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise ImportError('planted: this timm is broken')\n")
    out = tmp_path / "out"
    (out / "overhead.json").mkdir(parents=True)
    done = run_script("--dry-run", "--out", str(out), PYTHONPATH=str(fake.parent))
    assert done.returncode == 1
    table = (out / "table.txt").read_text()
    assert "models     skipped: the models need timm: planted: this timm is broken" in table
    assert "overhead   FAILED" in table
    assert "first-call ok" in table


def timed(name: str, ms: float | None, pass_: str = FORWARD, **more) -> Record:
    timing = None if ms is None else Timing(ms, ms, ms, 9)
    return Record(PROBLEM.to_dict(), name, pass_, "bfloat16", timing, **more)


def stored(folder: Path, *records: Record, device: str = "CPU") -> None:
    harness.add_ratios(records, gpu.OURS)
    harness.save(folder / "layers.json", {"device": device}, records, ceilings=CEILINGS)


def test_the_report_tells_times_ratios_and_reasons(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stored(
        tmp_path,
        timed(gpu.OURS, 0.1, work={"fraction_of_floor": 0.5, "fraction_of_products": 0.25}),
        timed(f"{gpu.OURS} graph", 0.08),
        timed("flex", 0.4),
        timed("natten", None, reason="not installed"),
    )
    assert gpu.main(["report", "--dry-run", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "copy 4.00 TB/s, bf16 product 800 TFLOP/s" in out
    assert "dinat_mini@224/56x56-d1 b128 bfloat16 forward" in out
    assert "50%" in out
    assert "0.400 (4.00x)" in out
    assert "0.0800 (0.80x)" in out
    assert "- natten, forward, bfloat16: not installed" in out
    assert "at most" not in out


def test_an_h200_is_held_to_its_targets(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stored(tmp_path, timed(gpu.OURS, 0.079), timed(gpu.OURS, 0.221, BACKWARD), device="NVIDIA H200")
    assert gpu.main(["report", "--dry-run", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if "at most" in line] == ["met", "MISSED"]


def test_the_report_holds_everything_that_was_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stored(tmp_path, timed(gpu.OURS, 0.1))
    problem = {"group": "tiny", "batch": 64, "mode": "eager"}
    model = Record(problem, "dinat_tiny", "inference", "bfloat16", Timing(32.0, 32.0, 32.0, 9))
    harness.save(tmp_path / "models.json", {}, [model])
    verdict = {"target": "first forward within 2000 ms, of all layers", "value": 1500.0, "met": True}
    first = Record(PROBLEM.to_dict(), gpu.OURS, FORWARD, "bfloat16", Timing(1500.0, 1500.0, 1500.0, 1),
                   also={"second_call_ms": 0.1})  # fmt: skip
    harness.save(tmp_path / "first_call.json", {}, [first], targets=[verdict])
    assert gpu.main(["report", "--dry-run", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "2000.0" in next(line for line in out.splitlines() if line.startswith("dinat_tiny"))
    assert "1500.00  met" in out


def test_a_report_of_nothing_fails(tmp_path: Path) -> None:
    assert gpu.main(["report", "--dry-run", "--out", str(tmp_path)]) == 1


def test_a_wrong_result_is_seen() -> None:
    truth = {"out": torch.ones(4, dtype=torch.float64)}
    assert gpu.errors({"out": torch.full((4,), torch.nan)}, truth)["out"] != 0
    assert not gpu.errors({"out": torch.full((4,), torch.nan)}, truth)["out"] <= 1
    assert gpu.errors({"out": torch.full((4,), 2.0)}, truth)["out"] == pytest.approx(1)


def test_on_a_gpu_each_call_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's timer with its cold L2 is what times; every sample of it counts."""
    import triton.testing

    asked = []

    def do_bench(call, **options):
        asked.append(options)
        return [call(), 3.0, 2.0]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    found = harness.measure_on(torch.device("cuda"), {"a": lambda: 1.0, "b": lambda: 10.0}, budget=0.3)
    assert {name: timing.median for name, timing in found.items()} == {"a": 2.0, "b": 3.0}
    assert asked[0]["return_mode"] == "all"
    assert asked[0]["rep"] == pytest.approx(60)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_graphs_are_refused_without_a_gpu() -> None:
    bench = ops.Bench(torch.device("cpu"), "tiled", CEILINGS, seconds=0.0)
    cell = ops.Cell(gpu.problem_of("tiny", gpu.TINY[0], 1), torch.float32, FORWARD)
    (record,) = bench.measure(cell, [ops.ours_graphed("tiled")])
    assert record.reason == "RuntimeError: CUDA graphs need a GPU"
