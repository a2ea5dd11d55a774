"""Exported models as steps, to be measured beside the eager ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from dinat_triton.export import FORMATS, export

# Format and dtype.
RUNTIMES = {name: (name, torch.float32) for name in FORMATS} | {"onnx-int8": ("onnx", torch.int8)}


def exported(model: nn.Module, images: Tensor, runtime: str) -> Callable[[], object]:
    """A step in a runtime: one batch through the file, which is checked and then forgotten."""
    to, dtype = RUNTIMES[runtime]
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"model{FORMATS[to].ending}"
        height, width = images.shape[2:]
        export(model, path, to, size=(height, width), batch=len(images), dtype=dtype)
        run = FORMATS[to].load(FORMATS[to].files(path))
    return lambda: run(images)
