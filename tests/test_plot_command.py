"""`dinat-triton plot`: files and characters that show the geometry, and messages instead of tracebacks."""

import signal
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path

import pytest

from dinat_triton import Geometry
from dinat_triton.cli import main


@pytest.mark.parametrize(
    "figure",
    [
        "neighborhood --shape 12 9 --kernel-size 3 --dilation 4 3 --at 5 5",
        "neighborhood --shape 40 --kernel-size 6 --stride 2 --causal 1",
        "neighborhood --shape 3 8 8 --kernel-size 3 --inverse --border clip shift wrap",
        "receptive-field --shape 28 28 --dilations 1 4 --compare",
        "receptive-field --shape 60 --dilations 1 4 --heat --border wrap",
        "plan --shape 14 10 --kernel-size 3 --dilation 2 1 --tile 3 2 --transposed",
        "plan --shape 40 --kernel-size 3 --tile 5 --border wrap",
        "plan --shape 3 6 6 --kernel-size 3 --tile 3",
        "plan --cost",
    ],
)
def test_every_figure_is_written(figure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figure.svg"
    assert main(["plot", *figure.split(), "-o", str(file), "--term"]) == 0
    assert file.read_bytes().startswith(b"<?xml")
    assert capsys.readouterr().out.strip()


def test_characters_are_the_geometrys(capsys: pytest.CaptureFixture[str]) -> None:
    command = "plot neighborhood --shape 11 14 --kernel-size 3 5 --dilation 3 2 --border clip wrap --at 10 3 --term"
    assert main(command.split()) == 0
    lines = [line.split(" ") for line in capsys.readouterr().out.splitlines()]
    assert [len(line) for line in lines] == [14] * 11
    tokens, _ = Geometry((11, 14), (3, 5), (3, 2), border=("clip", "wrap")).neighbors()
    seen = {y * 14 + x for y, line in enumerate(lines) for x, mark in enumerate(line) if mark in "#@"}
    assert seen == set(tokens[10 * 14 + 3].tolist()) - {-1}
    assert lines[10][3] == "@"


def test_attention_is_drawn_on_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "attention.pdf"
    command = ["plot", "attention", "--model", "dinat_mini", "--layers", "1", "--at", "0.2", "0.7", "--term"]
    assert main([*command, "-o", str(file)]) == 0
    assert file.read_bytes().startswith(b"%PDF")
    _, title, *lines, wrote = capsys.readouterr().out.rstrip("\n").split("\n")
    assert (title, wrote) == ("stage 1, block 2: kernel 7, dilation 8", f"wrote {file}")
    tokens, _ = Geometry((56, 56), (7,), (8,)).neighbors()
    query = int(0.2 * 56) * 56 + int(0.7 * 56)
    drawn = {56 * y + x for y, line in enumerate(lines) for x in range(56) if line[2 * x : 2 * x + 1].strip()}
    assert drawn == set(tokens[query].tolist())


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("explore --no-browser --port 99999", "--port must be between 0 and 65535"),
        ("plot neighborhood", "say where the figure goes"),
        ("plot neighborhood --kernel-size 9 --dilation 2 --term", "kernel_size * dilation must fit"),
        ("plot neighborhood --shape 500 500 --term", "up to 65536"),
        ("plot neighborhood -o no/such/folder/figure.png", "there is no folder"),
        ("plot receptive-field --shape 1024 1024 1024 --term", "has up to 1048576"),
        (f"plot plan --tile {10**23} --term", "--tile takes up to 65536"),
        ("plot plan --shape 128 128 --kernel-size 127 --tile 64 --term", "pairs over all classes"),
        ("plot attention --model resnet18d_of_none --term", "no model 'resnet18d_of_none'"),
        ("plot attention --image no/such/picture.png --term", "no such picture"),
        ("plot attention --layers 99 --term", "--layers must be between 0 and 17"),
        ("plot attention --heads 5 --term", "--heads must be between 0 and 1"),
    ],
)
def test_mistakes_get_a_message(command: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert "Traceback" not in error


def test_explore_serves_until_it_is_interrupted() -> None:
    command = [sys.executable, "-m", "dinat_triton.cli", "explore", "--no-browser", "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell makes what it starts in the background ignore interrupts, and this test with it.
    restore = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **pipes, preexec_fn=restore) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[0]
        assert url.startswith("http://127.0.0.1:")
        for path in ("", "page.js", "page.css", "api/about?shape=9&kernel=3"):
            with urllib.request.urlopen(url + path, timeout=20) as response:
                assert response.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert "Traceback" not in process.communicate()[1]
