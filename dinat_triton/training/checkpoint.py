"""Checkpoints of a run: a file each, whole or not there, the last ones kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dinat_triton.files import replacing

FOLDER = "checkpoints"


def write(run: Path, state: dict[str, Any], step: int, keep: int) -> None:
    """Writes what resumes a run at a step, and removes all but the last ones."""
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"step-{step:09}.pt") as beside:
        try:
            torch.save(state, beside)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(error) from error
    for path in _all(run)[:-keep]:
        path.unlink()


def latest(run: Path) -> Path | None:
    """The last checkpoint of a run."""
    return next(reversed(_all(run)), None)


def read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state["engine"]["done"]
        return state
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint of a run, or damaged: --resume takes another one") from error


def remove_unfinished(run: Path) -> None:
    """Removes what a run that was killed was writing."""
    for path in [*run.glob(".new-*"), *(run / FOLDER).glob(".new-*")]:
        path.unlink()


def _all(run: Path) -> list[Path]:
    return sorted((run / FOLDER).glob("step-*.pt"))
