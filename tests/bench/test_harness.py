"""One schema for all results: what is written can be read again, and nothing else is taken for it."""

import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dinat_triton.bench import harness
from dinat_triton.bench.harness import Record, Results, Timing
from dinat_triton.work import FORWARD, Ceilings

PROBLEM = {"name": "dinat_mini@224/7x7-d1", "heads": 16, "batch": 2}
CEILINGS = Ceilings("measured", "a machine", 1e10, {"float32": 1e11, "bfloat16": 1e12}, 1e9)


def record(name: str = "tiled", ms: float | None = 1.0, **more) -> Record:
    timing = None if ms is None else Timing(ms, 0.9 * ms, 1.1 * ms, 7)
    return Record(dict(PROBLEM), name, FORWARD, "float32", timing, **more)


def test_results_survive_a_file(tmp_path: Path) -> None:
    records = [record(also={"peak_bytes": 5}), record("flex", None, reason="too old")]
    results = Results("layers", harness.environment(torch.device("cpu")), records, CEILINGS)
    results.save(tmp_path / "found.json")
    assert Results.load(tmp_path / "found.json") == results
    assert str(Path.home()) not in json.dumps(results.environment)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1, "records": []}', "schema 3, got schema 1"),
        ('{"schema": 3, "rec', "not a whole result file"),
        ('{"schema": 3, "records": [{}]}', "holds no results"),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Results.load(path)
    assert str(path) in str(error.value)


def test_calls_take_turns_until_each_had_its_time() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timings = harness.measure(calls, budget=0.2)
    turns = 1 + sum(x != y for x, y in pairwise(order))
    assert turns >= 4  # of twelve
    # The first call of each turn only warms the caches.
    assert sum(timing.calls for timing in timings.values()) <= len(order) - turns // 2


def test_what_was_measured_until_a_stop_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    handler, measured = signal.getsignal(signal.SIGTERM), []
    with harness.stoppable():
        measured.append("first")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        measured.append("second")
    assert measured == ["first"]
    assert "is kept" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler
