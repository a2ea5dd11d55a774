"""One result file against another: what counts as slower, what is refused, and what scripts can go by."""

from pathlib import Path

import pytest

from dinat_triton import cli
from dinat_triton.bench import compare, harness
from dinat_triton.bench.compare import FASTER, SAME, SLOWER, Pair
from dinat_triton.bench.harness import FORWARD, Record, Timing

ENVIRONMENT = {"device": "A", "driver": None, "threads": 2, "versions": {"torch": "2.11", "triton": "3.6"}}


def write(path: Path, times: dict[str, tuple[float, float, float] | None], **environment) -> Path:
    """One record per name: (median, p20, p80), or none."""
    records = []
    for name, ms in times.items():
        problem = {"model": "dinat_mini", "name": "224/7x7-d1", "batch": 1}
        timing = Timing(*ms, 9) if ms else None
        records.append(Record(problem, name, FORWARD, "float32", timing, None if ms else "cannot"))
    harness.save(path, ENVIRONMENT | environment, records)
    return path


def run(*arguments: object) -> int:
    return cli.main(["bench", *map(str, arguments)])


@pytest.mark.parametrize(
    ("b", "verdict"),
    [
        ((1.5, 1.4, 1.6), SLOWER),
        ((1.5, 1.05, 1.6), SAME),
        ((0.5, 0.4, 0.6), FASTER),
        ((0.5, 0.4, 0.95), SAME),
        ((1.0, 0.9, 1.1), SAME),
    ],
)
def test_a_change_counts_if_the_times_do_not_overlap(b: tuple[float, float, float], verdict: str) -> None:
    assert Pair("", Timing(1.0, 0.9, 1.1, 9), Timing(*b, 9)).verdict == verdict


@pytest.mark.parametrize("command", ["compare", "ops --compare", "cpu --compare", "models --compare"])
def test_a_planted_slow_record_is_found(command: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a = write(tmp_path / "a.json", {"tiled": (1.0, 0.9, 1.1), "gather": (4.0, 3.9, 4.1)})
    b = write(tmp_path / "b.json", {"tiled": (2.0, 1.9, 2.1), "gather": (4.0, 3.9, 4.1)})
    assert run(*command.split(), a, b) == 1
    out = capsys.readouterr().out
    assert "dinat_mini@224/7x7-d1 float32 forward tiled" in out
    assert "2.000  slower" in out
    assert "1 slower, 0 faster, 1 the same" in out
    assert run(*command.split(), b, a) == 0
    assert "0.500  faster" in capsys.readouterr().out


def test_only_what_is_named_counts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a = write(tmp_path / "a.json", {"tiled": (1.0, 0.9, 1.1), "gather": (4.0, 3.9, 4.1)})
    b = write(tmp_path / "b.json", {"tiled": (1.0, 0.9, 1.1), "gather": (8.0, 7.9, 8.1)})
    assert run("compare", a, b) == 1
    assert run("compare", a, b, "--only", "tiled") == 0
    capsys.readouterr()
    assert run("compare", a, b, "--only", "tilde") == 2
    assert "did you mean tiled?" in capsys.readouterr().err


def test_other_conditions_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    times = {"tiled": (1.0, 0.9, 1.1)}
    a = write(tmp_path / "a.json", times)
    b = write(tmp_path / "b.json", times, device="B", versions={"torch": "2.12", "triton": "3.6"})
    assert run("compare", a, b) == 0
    err = capsys.readouterr().err
    assert "device A and B" in err
    assert "torch 2.11 and 2.12" in err
    assert "triton" not in err
    run("compare", a, a)
    assert "different" not in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a = write(tmp_path / "a.json", {"tiled": (1.0, 0.9, 1.1)})
    other = write(tmp_path / "b.json", {"triton": (1.0, 0.9, 1.1), "tiled": None})
    assert run("compare", a, other) == 2
    assert "no timed record in common" in capsys.readouterr().err
    other.write_text(a.read_text().replace('"schema": 2', '"schema": 1'))
    assert run("ops", "--compare", a, other) == 2
    assert "must be a result file of schema 2, got schema 1" in capsys.readouterr().err
    assert run("compare", a, tmp_path / "missing.json") == 2
    assert "missing.json" in capsys.readouterr().err


def test_the_ratio_is_of_b_over_a() -> None:
    pairs = compare.pairs_of(
        [Record({"name": "x"}, "tiled", FORWARD, "float32", Timing(2.0, 2.0, 2.0, 9))],
        [Record({"name": "x"}, "tiled", FORWARD, "float32", Timing(3.0, 3.0, 3.0, 9))],
    )
    assert [pair.ratio for pair in pairs] == [1.5]
