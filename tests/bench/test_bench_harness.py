"""One schema for all results: what is written can be read again, and nothing else is taken for it."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from dinat_triton.bench import harness
from dinat_triton.bench.harness import FORWARD, Record, Timing

PROBLEM = {"model": "dinat_mini", "name": "224/7x7-d1", "heads": 16, "batch": 2, "weight": 5}


def record(name: str = "tiled", ms: float | None = 1.0, **more) -> Record:
    timing = None if ms is None else Timing(ms, 0.9 * ms, 1.1 * ms, 7)
    return Record(dict(PROBLEM), name, FORWARD, "float32", timing, **more)


def saved(path: Path, *records: Record, **more) -> Path:
    harness.save(path, harness.environment("cpu"), records, **more)
    return path


def test_records_survive_a_file(tmp_path: Path) -> None:
    records = [record(work={"bytes": 8.0}, also={"peak_bytes": 5}), record("flex", None, reason="too old")]
    harness.add_ratios([*records, record("gather", 3.0)], "tiled")
    path = saved(tmp_path / "new" / "found.json", *records, ceilings={"copy_bytes_per_s": 1e9})
    assert harness.load_records(path) == records
    assert records[0].ratios == {"gather": 3.0}
    assert harness.load(path)["ceilings"] == {"copy_bytes_per_s": 1e9}


def test_an_environment_says_what_a_result_depends_on() -> None:
    found = harness.environment("cpu")
    assert {"device", "driver", "versions", "commit", "date", "threads"} <= found.keys()
    assert {"torch", "triton", "natten", "timm", "dinat-triton"} <= found["versions"].keys()
    assert str(Path.home()) not in json.dumps(found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1, "records": []}', "schema 2, got schema 1"),
        ("[]", "schema 2, got schema None"),
        ('{"schema": 2, "rec', "not a whole result file"),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        harness.load_records(path)
    assert str(path) in str(error.value)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "found.json", record())
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="not a whole result file"):
        harness.load(path)


@pytest.mark.parametrize("content", [{}, {"records": [{}]}, {"records": 3}])
def test_a_file_without_records_is_refused(content: dict, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    path.write_text(json.dumps({"schema": harness.SCHEMA, **content}))
    with pytest.raises(ValueError, match="holds no records"):
        harness.load_records(path)


@pytest.mark.parametrize("path", sorted((harness.ROOT / "bench" / "results").glob("*/cpu.json")), ids=str)
def test_committed_results_are_of_this_schema(path: Path) -> None:
    for name in ("cpu.json", "models.json"):
        assert any(record.timing for record in harness.load_records(path.with_name(name)))


def test_percentiles_enclose_the_median() -> None:
    timing = Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (timing.p20, timing.median, timing.p80, timing.calls) == (2.0, 3.5, 5.0, 6)


def test_calls_take_turns_until_each_had_its_time() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timings = harness.measure(calls, budget=0.02, slice_s=0.002)
    turns = 1 + sum(x != y for x, y in pairwise(order))
    assert turns >= 4
    # The first call of each turn only warms the caches.
    assert sum(timing.calls for timing in timings.values()) <= len(order) - turns // 2


def test_a_title_names_everything_that_was_measured() -> None:
    assert record().title == "dinat_mini@224/7x7-d1 b2 float32 forward"


@pytest.mark.parametrize(
    ("ms", "text"), [(0.05312, "0.0531"), (1.0, "1.00"), (9.996, "10.00"), (53.12, "53.1"), (2345.6, "2346"), (0, "0")]
)
def test_times_have_three_digits(ms: float, text: str) -> None:
    assert harness.milliseconds(ms) == text
