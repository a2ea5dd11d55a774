"""What can be tried of the shell scripts without a GPU: arguments, time limits, and all of it in the interpreter."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinat_triton.bench.harness import FOLDER, Results

BASH = shutil.which("bash") or "bash"
SCRIPT, BUILD = FOLDER / "gpu_run.sh", FOLDER / "build_natten.sh"
PARTS = ("tests", "memcheck", "racecheck", "tune", "layers", "video", "models", "overhead")


def run_script(*arguments: str, script: Path = SCRIPT, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHON": sys.executable}
    return subprocess.run([BASH, script, *arguments], env=environment | variables, capture_output=True, text=True)


@pytest.mark.parametrize("script", [SCRIPT, BUILD])
@pytest.mark.parametrize("arguments", [["--bogus"], ["--out"]])
def test_wrong_arguments_are_named(script: Path, arguments: list[str]) -> None:
    done = run_script(*arguments, script=script)
    assert done.returncode == 2
    assert arguments[0] in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run(tmp_path: Path) -> None:
    done = run_script("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "torch sees no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_script_ends_within_eight_minutes() -> None:
    found = re.findall(r'\b(?:part|timeout) (?:"?[$\w]+"? )?(\d+) "', SCRIPT.read_text())
    assert len(found) == len(PARTS)  # the sanitizer's two in one line, and the report
    assert sum(map(int, found)) + int(found[1]) <= 470


@pytest.mark.slow
def test_a_dry_run_passes_every_part_but_one_whose_result_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "overhead.json").mkdir()
    done = run_script("--dry-run", "--out", str(tmp_path), DINAT_TRITON_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 1, done.stdout
    states = [line.split()[:2] for line in (tmp_path / "table.txt").read_text().splitlines()[-len(PARTS) :]]
    assert states == [[part, "FAILED" if part == "overhead" else "ok,"] for part in PARTS]
    for name in ("layers", "video", "models"):
        assert any(record.timing for record in Results.load(tmp_path / f"{name}.json").records)
