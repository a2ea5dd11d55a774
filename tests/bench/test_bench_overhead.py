"""Python per call and first calls: what is measured, and that the pieces add up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.runtime import JITFunction

from dinat_triton import cli, na2d
from dinat_triton.bench import first_call, harness, memory, overhead
from dinat_triton.bench.harness import BACKWARD, FORWARD, Record, Timing
from dinat_triton.bench.overhead import LAUNCH, LAUNCHED, MODULE, NA2D, OP, RECORDED

compiled = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the kernels are interpreted")


def record(name: str, us: float, pass_: str = FORWARD) -> Record:
    problem = {"model": "dinat_mini", "name": "224/14x14-d2", "batch": 1}
    return Record(problem, name, pass_, "bfloat16", Timing(us / 1e3, us / 1e3, us / 1e3, 9))


@compiled
def test_nothing_is_launched_and_nothing_stays_changed() -> None:
    run = JITFunction.run
    qkv = torch.randn(3, 1, 14, 14, 2, 16)
    with overhead.nothing_launched():
        out = na2d(*qkv, 7, dilation=2, backend="triton")
        assert out.shape == qkv.shape[1:]
        assert JITFunction.run is not run
    assert JITFunction.run is run
    with pytest.raises(RuntimeError, match="cannot run this call"):
        na2d(*qkv, 7, dilation=2, backend="triton")


def test_the_interpreter_has_no_launch_to_stop_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"), overhead.nothing_launched():
        pass


@compiled
def test_every_level_of_code_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "overhead.json"
    layers = ["--layers", "224:14x14*"]
    assert cli.main(["bench", "overhead", *layers, "--device", "cpu", "--seconds", "0.03", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "= functional + op + launch" in " ".join(printed.split())
    assert "na2d forward at most 15 us: 224/14x14-d1" in printed
    records = harness.load_records(out)
    found = {(r.problem["name"], r.pass_, r.implementation) for r in records}
    for name in ("224/14x14-d1", "224/14x14-d2"):
        levels = {implementation for layer, pass_, implementation in found if (layer, pass_) == (name, FORWARD)}
        assert levels == {NA2D, MODULE, OP, LAUNCH}
        assert {i for layer, pass_, i in found if (layer, pass_) == (name, BACKWARD)} == {NA2D, MODULE, LAUNCH}
        assert (name, RECORDED, NA2D) in found
    # What is outside holds what is inside, whatever the machine does meanwhile.
    least = {(r.problem["name"], r.pass_, r.implementation): r.timing.p20 for r in records if r.timing}
    for name, pass_, implementation in found:
        assert least[name, pass_, implementation] >= 0.8 * least[name, pass_, LAUNCH]


def test_the_parts_of_a_call_add_up() -> None:
    us = {NA2D: 50.0, MODULE: 52.0, OP: 40.0, LAUNCH: 15.0, LAUNCHED: 80.0}
    assert overhead.split_up(us) == [50.0, 52.0, 10.0, 25.0, 15.0, 80.0]
    assert overhead.split_up({NA2D: 50.0, MODULE: 52.0, LAUNCH: 15.0}) == [50.0, 52.0, 0.0, 35.0, 15.0, None]


def test_targets_are_of_whole_calls() -> None:
    records = [record(NA2D, 14.9), record(MODULE, 15.1), record(LAUNCH, 99.0)]
    assert [v["met"] for v in overhead.judge(records)] == [True, False]


# First calls


def test_a_first_call_is_of_a_fresh_process(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "first.json"
    assert cli.main(["bench", "first-call", "--layers", "224:7x7*", "--device", "cpu", "--out", str(out)]) == 0
    forward, backward = harness.load_records(out)
    assert (forward.pass_, backward.pass_) == (FORWARD, BACKWARD)
    # The plan and torch's first use of everything: several times a later call at least.
    assert forward.timing
    assert forward.timing.median > 2 * forward.also["second_call_ms"]
    assert "first forward within 2000 ms" in capsys.readouterr().out


def test_a_first_call_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(first_call, "OURS", {"cpu": "triton"})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["bench", "first-call", "--layers", "224:7x7*", "--device", "cpu"]) == 1
    assert "backend 'triton' cannot run this call" in capsys.readouterr().out


def test_slow_first_calls_miss_the_target() -> None:
    slow = Record({"name": "x"}, "triton", FORWARD, "bfloat16", Timing(2500.0, 2500.0, 2500.0, 1))
    fast = Record({"name": "y"}, "triton", FORWARD, "bfloat16", Timing(100.0, 100.0, 100.0, 1))
    assert [v["met"] for v in first_call.judge([slow, fast])] == [False]
    assert [v["met"] for v in first_call.judge([fast])] == [True]


# Memory


def test_a_peak_is_what_was_live_at_once() -> None:
    code = (
        "from dinat_triton.bench.memory import resident_peak\n"
        "def run():\n"
        "    for _ in range(3): x = bytearray(32 << 20); x[::4096] = bytes(len(x[::4096])); del x\n"
        "warm = bytes([1]) * (64 << 20); del warm; print(resident_peak(run))"
    )
    environment = os.environ | memory.EAGER_ALLOCATOR
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert 0.9 < int(done.stdout) / (32 << 20) < 1.3


def test_a_function_runs_in_a_fresh_process() -> None:
    assert memory.in_fresh_process(json.dumps, {}, obj=[1, 2]) == "[1, 2]"
    assert memory.in_fresh_process(os.getenv, {"DINAT_TEST": "set"}, key="DINAT_TEST") == "set"


def test_a_failing_process_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"dumps in a fresh process: TypeError: .*nonsense"):
        memory.in_fresh_process(json.dumps, {}, obj=1, nonsense=1)
