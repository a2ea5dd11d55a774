"""`dinat-triton demo`: its verdict, and what it says of the machine and to wrong options."""

import pytest

from dinat_triton.cli import main
from dinat_triton.commands import demo


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "LAYERS", (("a layer", 14, 2, 2),))


def test_it_names_the_backends_and_why_one_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert "tiled      runs" in printed
    assert "All right: every backend agrees with float64" in printed


def test_a_wrong_backend_fails_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    na2d = demo.na2d
    monkeypatch.setattr(
        demo, "na2d", lambda *a, backend, **k: na2d(*a, backend=backend, **k) * (1 + (backend == "tiled"))
    )
    assert main(["demo", "--repeats", "1"]) == 1
    assert "FAILED" in capsys.readouterr().err


def test_wrong_options_say_what_would_be_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--batch", "0"]) == 2
    assert "--batch must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["nonsense"])
