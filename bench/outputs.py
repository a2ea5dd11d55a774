"""Where a command is asked to write: refused before anything is measured, not after."""

from __future__ import annotations

import os
from pathlib import Path

FIGURES = (".png", ".svg", ".pdf")


def check_outputs(figure: Path | None = None, file: Path | None = None, folder: Path | None = None) -> None:
    """Refuses what cannot be written.

    Args:
        figure: A figure's file.
        file: Any other file.
        folder: Where several files go.
    """
    if figure is not None and figure.suffix.lower() not in FIGURES:
        raise ValueError(f"a figure's file must end in .png, .svg or .pdf, got {str(figure)!r}")
    for path in (figure and figure.parent, file and file.parent, folder):
        if path is None:
            continue
        if not path.is_dir():
            raise ValueError(f"there is no folder {str(path)!r} to write to")
        if not os.access(path, os.W_OK):
            raise ValueError(f"the folder {str(path)!r} cannot be written to")
