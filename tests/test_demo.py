"""`dinat-triton demo`: its verdict, and what it says to wrong options."""

import pytest

from dinat_triton.cli import main
from dinat_triton.commands import demo


@pytest.mark.parametrize("off", [False, True])
def test_it_names_the_backends_and_a_wrong_one_fails_it(off: bool, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def na2d(*arguments, backend, **options):
        return right(*arguments, backend=backend, **options) * (1 + (off and backend == "tiled"))

    right = demo.na2d
    monkeypatch.setattr(demo, "LAYERS", (("a layer", 14, 2, 2),))
    monkeypatch.setattr(demo, "na2d", na2d)
    assert main(["demo", "--repeats", "1"]) == off
    printed = capsys.readouterr()
    assert "tiled      runs" in printed.out
    assert ("All right: every backend agrees with float64" in printed.out) != ("FAILED" in printed.err) == off


def test_wrong_options_say_what_would_be_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--batch", "0"]) == 2
    assert "--batch must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["nonsense"])
