"""A run that was interrupted, at any moment, ends with the bits of one that was not."""

import csv
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dinat_triton.training import beat, checkpoint
from dinat_triton.training.engine import Engine

from .conftest import EVERYTHING

TRAIN = Callable[..., int]


def results(run: Path) -> tuple[Any, ...]:
    """What must not depend on interruptions."""
    with open(run / "metrics.csv", newline="") as file:
        rows = [{key: value for key, value in row.items() if key != "images_per_s"} for row in csv.DictReader(file)]
    assert not [*run.rglob(".new-*")]
    return rows, (run / "last.safetensors").read_bytes(), (run / "best.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(train: TRAIN, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, ...]]:
    """What a run leaves that nothing interrupted. On one thread, as in a fork, which has none of its parent's."""
    threads, run = torch.get_num_threads(), tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    assert train(run, EVERYTHING) == 0
    yield results(run)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A beat after every batch, so that --checkpoint-minutes 0 writes that often."""
    monkeypatch.setattr(beat, "SECONDS", 0.0)


def interrupt(patch: pytest.MonkeyPatch, target: Any, name: str, call: int, how: Callable[..., Any]) -> None:
    """Lets something happen in the n-th call of a function."""
    before, calls = getattr(target, name), iter(range(1, 10**6))

    def changed(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            how(*args)
        return before(*args, **kwargs)

    patch.setattr(target, name, changed)


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_half(_: Any, path: Path) -> None:
    path.write_bytes(b"half")
    kill()


@pytest.mark.parametrize(
    ("minutes", "when"),
    [
        (0, (torch, "save", 8, write_half)),
        (0, (beat.Beat, "due", 6, kill)),  # while it validates
        (10, (checkpoint, "write", 2, kill)),  # all but the checkpoint is written of an epoch
    ],
)
def test_a_killed_run_goes_on_with_the_same_bits(
    minutes: int, when: tuple[Any, ...], train: TRAIN, whole: Any, tmp_path: Path, monkeypatch
) -> None:
    options = f"{EVERYTHING} --checkpoint-minutes {minutes} --resume auto"
    with monkeypatch.context() as patch:
        interrupt(patch, *when)
        augments_apart = f"{options} --workers 1"
        process = multiprocessing.get_context("fork").Process(target=train, args=(tmp_path, augments_apart))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert train(tmp_path, options) == 0
    assert results(tmp_path) == whole


def test_sigterm_writes_a_checkpoint_and_says_so(train: TRAIN, whole: Any, tmp_path: Path, monkeypatch, capsys) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, Engine, "step", 6, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert train(tmp_path, EVERYTHING) == 75
    assert "terminated after step 6; --resume auto goes on from there" in capsys.readouterr().out
    assert checkpoint.latest(tmp_path).name == "step-000000006.pt"
    assert train(tmp_path, f"{EVERYTHING} --resume auto") == 0
    assert results(tmp_path) == whole
