"""One result file against another: what counts as slower, and what scripts can go by."""

from pathlib import Path

import pytest

from dinat_triton import cli
from dinat_triton.bench.compare import FASTER, SAME, SLOWER, Pair
from dinat_triton.bench.harness import Record, Results, Timing

ENVIRONMENT = {"device": "A", "driver": None, "threads": 2, "versions": {"torch": "2.11", "triton": "3.6"}}
NAME = "dinat_mini@224/7x7-d1"


def write(path: Path, times: dict[str, tuple[float, float, float] | None], **environment) -> Path:
    """One record per name: (median, p20, p80), or none."""
    records = [
        Record({"name": NAME}, name, "forward", "float32", Timing(*ms, 9) if ms else None, None if ms else "cannot")
        for name, ms in times.items()
    ]
    Results("layers", ENVIRONMENT | environment, records).save(path)
    return path


def run(*arguments: object) -> int:
    return cli.main(["bench", "compare", *map(str, arguments)])


@pytest.mark.parametrize(
    ("b", "verdict"),
    [
        ((1.5, 1.4, 1.6), SLOWER),
        ((1.5, 1.05, 1.6), SAME),
        ((0.5, 0.4, 0.6), FASTER),
    ],
)
def test_a_change_counts_if_the_times_do_not_overlap(b: tuple[float, float, float], verdict: str) -> None:
    assert Pair("", Timing(1.0, 0.9, 1.1, 9), Timing(*b, 9)).verdict == verdict


def test_a_planted_slow_record_is_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a = write(tmp_path / "a.json", {"tiled": (1.0, 0.9, 1.1), "gather": (4.0, 3.9, 4.1)})
    b = write(tmp_path / "b.json", {"tiled": (2.0, 1.9, 2.1), "gather": (4.0, 3.9, 4.1)})
    assert run(a, b) == 1
    out = capsys.readouterr().out
    assert f"{NAME} b1 float32 forward tiled" in out
    assert "2.000  slower" in out
    assert "1.414x the time of A in geometric mean of 2: 1 slower, 0 faster, 1 same" in out
    assert run(b, a) == 0
    assert run(a, b, "--only", "gather") == 0


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a = write(tmp_path / "a.json", {"tiled": (1.0, 0.9, 1.1)})
    b = write(tmp_path / "b.json", {"triton": (1.0, 0.9, 1.1), "tiled": None})
    assert (run(a, b), run(a, a, "--only", "tilde"), run(a, tmp_path / "missing.json")) == (2, 2, 2)
    assert "no timed record in common" in capsys.readouterr().err
