"""What a machine allows at most: measured, by its vendor, or out of a file; and the kernel that counts exponentials."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.compiler import ASTSource

from dinat_triton.bench import ceilings, exps, harness
from dinat_triton.offline import inspect
from dinat_triton.offline.targets import TARGETS, find_target

compiled = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the kernels are interpreted")

INTERPRETED = """
import torch
from dinat_triton.bench import exps
x = torch.linspace(-1, 1, 2 * exps.BLOCK)
out = torch.full_like(x, torch.nan)
counted = exps.launch(x, out, rounds=5)
expected = sum(2 ** (x.double() - n) for n in range(5))
assert counted == 5 * len(x), counted
print((out - expected).abs().max().item())
"""


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return ceilings.measure_ceilings("cpu")


def test_a_measured_machine_is_sane(measured: dict[str, Any]) -> None:
    ceilings.check(measured, "this machine")
    assert measured["source"] == "measured"
    assert measured["device"] == harness.cpu_name()
    # An exponential is at least a few operations and a few bytes on any CPU.
    assert measured["product_flops_per_s"]["float32"] > measured["exps_per_s"]
    assert 1e8 < measured["exps_per_s"] < 1e13
    assert 1e8 < measured["copy_bytes_per_s"] < 1e13
    assert measured["product_flops_per_s"]["float32"] > measured["copy_bytes_per_s"] / 4


def test_rates_are_work_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "seconds", lambda call, device: 0.5)
    cpu = torch.device("cpu")
    assert ceilings.copy_rate(cpu) == 2 * ceilings.COPIED["cpu"] / 0.5
    assert ceilings.product_rate(cpu, torch.float32) == 2 * ceilings.SIDE["cpu"] ** 3 / 0.5
    assert ceilings.exp_rate(cpu) == torch.get_num_threads() * ceilings.EXPS_PER_THREAD / 0.5


def test_seconds_are_those_of_the_call() -> None:
    found = ceilings.seconds(lambda: time.sleep(0.02), torch.device("cpu"))
    assert 0.02 <= found < 0.2


def test_float32_products_are_full_and_the_setting_comes_back() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with ceilings.full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("arch", TARGETS)
def test_a_vendor_has_ceilings_for_every_architecture(arch: str) -> None:
    found, target = ceilings.ceilings_of(arch), find_target(arch)
    ceilings.check(found, arch)
    assert "not measured" in found["source"]
    assert target.gpu in found["device"]
    assert found["product_flops_per_s"]["bfloat16"] > found["product_flops_per_s"]["float32"] > found["exps_per_s"]
    assert found["copy_bytes_per_s"] == target.memory


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="sm_91"):
        ceilings.ceilings_of("sm_91")


def test_a_result_file_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    harness.save(path, harness.environment(), [])
    assert ceilings.ceilings_in(path) is None
    harness.save(path, harness.environment(), [], ceilings=ceilings.ceilings_of("sm_90"))
    assert ceilings.ceilings_in(path) == ceilings.ceilings_of("sm_90")


@pytest.mark.parametrize(
    "broken",
    [
        {"copy_bytes_per_s": 0},
        {"exps_per_s": None},
        {"product_flops_per_s": {"float32": 1.0}},
        {"product_flops_per_s": 3.0},
    ],
)
def test_incomplete_ceilings_are_refused(broken: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    harness.save(path, harness.environment(), [], ceilings=ceilings.ceilings_of("sm_90") | broken)
    with pytest.raises(ValueError, match=r"layers\.json must hold positive rates"):
        ceilings.ceilings_in(path)


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    path.write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="schema 99"):
        ceilings.ceilings_in(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_none_is_measured() -> None:
    with pytest.raises(RuntimeError, match="torch sees no GPU"):
        ceilings.measure_ceilings("cuda")


def test_only_cpus_and_gpus_are_measured() -> None:
    with pytest.raises(ValueError, match="cpu or cuda, got 'meta'"):
        ceilings.measure_ceilings("meta")


def test_the_kernel_computes_what_it_counts() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


@compiled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_exponentials_bind_the_kernel(arch: str) -> None:
    target = TARGETS[arch]
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(2)}
    signature = {"x": "*fp32", "out": "*fp32", "ROUNDS": "constexpr", "BLOCK": "constexpr"}
    source = ASTSource(exps.exps_kernel, signature, {"ROUNDS": exps.ROUNDS, "BLOCK": exps.BLOCK}, aligned)
    options = {"num_warps": exps.WARPS, **exps.FUSION}
    read = inspect._read_amd if target.is_amd else inspect._read_nvidia
    found = read(triton.compile(source, target=target.triton, options=options).asm)
    loop = inspect.loop_lengths(found["code"], found["exp"])
    threads = exps.WARPS * target.warp
    assert found["spills"] == 0
    assert loop["exps"] % (exps.BLOCK // threads) == 0
    # What a multiprocessor issues per exponential, against what it could issue while it computes one.
    issued = loop["chunk_length"] / loop["exps"]
    assert issued < 0.5 * target.issues_per_clock * target.warp / target.exps_per_clock
