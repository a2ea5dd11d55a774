"""`dinat-triton bench training`: the loop beside the bare step."""

from pathlib import Path

from accelerate.state import AcceleratorState

from dinat_triton.bench.harness import Results
from dinat_triton.cli import main


def test_the_loop_is_timed_beside_the_same_step(tmp_path: Path, capsys) -> None:
    path = tmp_path / "training.json"
    assert main(["bench", "training", "--model", "resnet10t", "--seconds", "0.2", "--out", str(path)]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    records = {record.implementation: record for record in Results.load(path).records}
    assert set(records) == {"bare step", "loop"}
    ratio = records["loop"].timing.median / records["bare step"].timing.median
    assert f"The loop adds {100 * (ratio - 1):.1f} % to a step." in capsys.readouterr().out
    assert 0.3 < ratio < 3
