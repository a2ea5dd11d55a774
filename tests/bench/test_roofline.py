"""What binds: ceilings, bounds, times out of files, and the command."""

import time
from pathlib import Path

import pytest
import torch
import triton

from dinat_triton import cli
from dinat_triton.bench import ceilings
from dinat_triton.bench.harness import Results

CPU = torch.device("cpu")


def test_a_measured_machine_is_sane() -> None:
    found = ceilings.measure_ceilings(CPU)
    # An exponential is at least a few operations and a few bytes on any CPU.
    assert found.product_flops_per_s["float32"] > max(found.exps_per_s, found.copy_bytes_per_s / 4)
    assert 1e8 < min(found.exps_per_s, found.copy_bytes_per_s) < 1e13
    assert 0.02 <= ceilings.seconds(lambda: time.sleep(0.02), CPU) < 0.2


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the kernels are interpreted")
def test_a_named_architecture_is_drawn_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["roofline", "--arch", "sm_90", "--layers", "224:14x14*", "--backward", "--out"]
    for name in ("roof.svg", "roof.json"):
        assert cli.main([*arguments, str(tmp_path / name)]) == 0
        assert "H200 (sm_90), vendor's figures, not measured: copies 4.3 TB/s" in capsys.readouterr().out
    assert "H200" in (tmp_path / "roof.svg").read_text()
    assert {r.problem["batch"] for r in Results.load(tmp_path / "roof.json").records} == {128}
