"""Steps of a model in other runtimes and other numbers, to be measured beside the eager ones in float32."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from dinat_triton.export import FORMATS, export

Step = Callable[[], object]


def exported(to: str, dtype: torch.dtype, model: nn.Module, images: Tensor) -> Step:
    """One batch through the file, which is checked and then forgotten."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"model{FORMATS[to].ending}"
        height, width = images.shape[2:]
        export(model, path, to, size=(height, width), batch=len(images), dtype=dtype)
        run = FORMATS[to].load(FORMATS[to].files(path))
    return lambda: run(images)


def in_bfloat16(model: nn.Module, images: Tensor) -> Step:
    rounded, images = deepcopy(model).bfloat16(), images.bfloat16()
    return torch.inference_mode()(lambda: rounded(images))


def in_int8(model: nn.Module, images: Tensor) -> Step:
    """Weights of linear layers in int8, and their inputs as they come."""
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # torchao's int8 is slower on CPUs
        rounded = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    return torch.inference_mode()(lambda: rounded(images))


RUNTIMES: dict[str, Callable[[nn.Module, Tensor], Step]] = {
    **{name: partial(exported, name, torch.float32) for name in FORMATS},
    "onnx-int8": partial(exported, "onnx", torch.int8),
    "openvino-bfloat16": partial(exported, "openvino", torch.bfloat16),
    "bfloat16": in_bfloat16,
    "int8": in_int8,
}
