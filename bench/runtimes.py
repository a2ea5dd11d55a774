"""Exported models as steps, to be measured beside the eager ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from dinat_triton.export import FORMATS, export


def exported(model: nn.Module, images: Tensor, to: str) -> Callable[[], object]:
    """A step in the runtime of a format: one batch through the file, which is checked and then forgotten."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"model{FORMATS[to].ending}"
        height, width = images.shape[2:]
        export(model, path, to, size=(height, width), batch=len(images))
        run = FORMATS[to].load(FORMATS[to].files(path))
    return lambda: run(images)
