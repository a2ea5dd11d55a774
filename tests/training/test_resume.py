"""A run that was interrupted, at any moment, ends with the bits of one that was not."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dinat_triton.training import beat, checkpoint
from dinat_triton.training.engine import Engine

from .conftest import EVERYTHING, SMALL

TRAIN = Callable[..., int]


class Killed(BaseException):
    """Nothing catches it, like SIGKILL."""


def results(run: Path) -> tuple[Any, ...]:
    """What must not depend on interruptions."""
    with open(run / "metrics.csv", newline="") as file:
        rows = [{key: value for key, value in row.items() if key != "images_per_s"} for row in csv.DictReader(file)]
    assert not [*run.rglob(".new-*")]
    return rows, (run / "last.safetensors").read_bytes(), (run / "best.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(train: TRAIN, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """What a run leaves that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole")
    assert train(run, EVERYTHING) == 0
    return results(run)


@pytest.fixture
def every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A beat after every batch, so that --checkpoint-minutes 0 writes that often."""
    monkeypatch.setattr(beat, "SECONDS", 0.0)


def interrupt(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, call: int, how: Callable[..., Any]) -> None:
    """Lets something happen in the n-th call of a function."""
    before, calls = getattr(target, name), iter(range(1, 10**6))

    def changed(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            how(*args)
        return before(*args, **kwargs)

    monkeypatch.setattr(target, name, changed)


def kill(*_: Any) -> None:
    raise Killed


def write_half(_: Any, path: Path) -> None:
    path.write_bytes(b"half")
    raise Killed


@pytest.mark.parametrize(
    ("minutes", "when"),
    [
        (0, (Engine, "step", 7, kill)),
        (10, (Engine, "step", 9, kill)),  # no checkpoint since the last epoch
        (0, (torch, "save", 6, write_half)),
        (0, (beat.Beat, "due", 6, kill)),  # while it validates
        (10, (checkpoint, "write", 2, kill)),  # all but the checkpoint is written of an epoch
    ],
)
@pytest.mark.usefixtures("every_batch")
def test_a_killed_run_goes_on_with_the_same_bits(
    minutes: int, when: tuple[Any, ...], train: TRAIN, whole: Any, tmp_path: Path, monkeypatch
) -> None:
    options = f"{EVERYTHING} --checkpoint-minutes {minutes} --resume auto"
    with monkeypatch.context() as patch:
        interrupt(patch, *when)
        with pytest.raises(Killed):
            train(tmp_path, f"{options} --workers 1")  # a process of its own draws augmentation
    assert train(tmp_path, options) == 0
    assert results(tmp_path) == whole


def test_sigterm_writes_a_checkpoint_and_says_so(
    train: TRAIN, whole: Any, tmp_path: Path, monkeypatch, every_batch, capsys
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, Engine, "step", 8, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert train(tmp_path, EVERYTHING) == 75
    assert "terminated after step 8; --resume auto goes on from there" in capsys.readouterr().out
    assert checkpoint.latest(tmp_path).name == "step-000000008.pt"
    assert train(tmp_path, f"{EVERYTHING} --resume auto") == 0
    assert results(tmp_path) == whole


@pytest.mark.slow
def test_ten_kills_at_any_moment(pictures: Path, tmp_path: Path) -> None:
    """SIGKILL from outside, one of them while a checkpoint is being written."""
    random.seed(0)
    command = [sys.executable, "-m", "dinat_triton", "train", str(pictures), *SMALL.split(), *EVERYTHING.split()]
    command += ["--epochs", "60", "--checkpoint-minutes", "0.01", "--resume", "auto", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    for number in range(10):
        with subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.PIPE) as run:
            run.stdout.readline()  # it begins
            if number == 5:
                while run.poll() is None and not list((tmp_path / "killed" / "checkpoints").glob(".new-*")):
                    time.sleep(1e-4)
            else:
                time.sleep(random.uniform(0, 2.5))
            assert run.poll() is None, "it must not be done before it is killed"
            run.kill()
    subprocess.run([*command, str(tmp_path / "killed")], check=True)
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
