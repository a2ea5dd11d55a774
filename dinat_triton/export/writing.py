"""A model into a file: traced, written, and run in the file's own runtime against the model before it stays."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dinat_triton import ops
from dinat_triton.export.formats import Format, Metadata, format_of
from dinat_triton.files import check_target, replacing

# The largest difference that a file's output may have from the model's, of the largest output.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01, torch.int8: 0.1}


@dataclass(frozen=True)
class Written:
    """A file that was written.

    Attributes:
        path: The file.
        difference: Its largest difference from the model's own output, in its own runtime.
        largest: The largest output, for comparison.
    """

    path: Path
    difference: float
    largest: float


def export(
    model: nn.Module,
    path: str | Path,
    to: str,
    *,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    dtype: torch.dtype = torch.float32,
    class_names: Sequence[str] | None = None,
    force: bool = False,
) -> Written:
    """Writes a model of images to a file that needs nothing of this package, and checks the file.

    Args:
        model: Takes `[batch, channels, height, width]` in float32 and returns one tensor. It is not changed.
        path: The file.
        to: Its format: "onnx", "openvino", "aoti", "torchscript" or "pt2".
        size: Height and width of all images; those the model was made for by default.
        batch: Images at once; any number by default.
        dtype: What is computed in: float32, bfloat16 or float16, and for ONNX int8: weights and inputs of linear layers
            are rounded to it. Images and output are float32 all the same.
        class_names: Written into the file.
        force: Whether to replace a file that is there already.

    Returns:
        Where it is and how far its output is from the model's. A file that is too far off is not left behind.
    """
    format, path = format_of(to), Path(path)
    format.check_dtype(dtype)
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, or None for any, got {batch}")
    check_target(path, endings=(format.ending,), force=force)
    for further in format.files(path)[1:]:
        check_target(further, force=force)
    config = timm.data.resolve_data_config({}, model=model)
    channels, *own_size = config["input_size"]
    height, width = size or own_size
    images = torch.randn(batch or 2, channels, height, width, generator=torch.Generator().manual_seed(0))
    model = InDtype(model, torch.float32 if dtype == torch.int8 else dtype)
    program = trace(model, images, any_batch=batch is None)
    with ExitStack() as stack:
        besides = [stack.enter_context(replacing(file)) for file in format.files(path)]
        format.write(program, besides, metadata_of(config, (height, width), batch, dtype, class_names))
        if dtype == torch.int8:
            format.quantize(besides)
        # Any other batch and other images than those that were traced.
        images = images.flip(0, 3) if batch else images.flip(3).repeat(2, 1, 1, 1)[:3]
        difference, largest = compare(format, besides, model, images)
        bound = BOUNDS[dtype] * largest
        if not difference <= bound:
            raise RuntimeError(
                f"{path} would differ from the model by {difference:.1e}, above {bound:.1e}; nothing is written"
            )
    return Written(path, difference, largest)


class InDtype(nn.Module):
    """A copy of a model for inference that computes in a dtype and takes and returns float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = copy.deepcopy(model).to("cpu", dtype).eval().requires_grad_(False), dtype

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images.to(self.dtype))
        if not isinstance(output, Tensor):
            raise TypeError(f"model must return one tensor, got {type(output).__name__}")
        return output.float()


def trace(model: nn.Module, images: Tensor, any_batch: bool) -> ExportedProgram:
    """The model's graph, in torch's own operations."""
    model(images)  # says in eager mode what is wrong with the images
    shapes = ({0: Dim("batch")},) if any_batch else None
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    may_hide = any(bool(x.isneginf().any()) for x in model.parameters())
    return program.run_decompositions({torch.ops.dinat_triton.na.default: partial(ops.opened, may_hide=may_hide)})


def compare(format: Format, files: list[Path], model: nn.Module, images: Tensor) -> tuple[float, float]:
    """The largest difference of what files compute from what the model does, and the largest output."""
    with torch.no_grad():
        expected = model(images)
        try:
            found = format.load(files)(images)
        except Exception as error:  # runtimes have classes of their own
            reason = str(error).strip().partition("\n")[0]
            raise RuntimeError(f"the runtime of format {format.name!r} cannot run the file: {reason}") from error
        return float((found - expected).abs().max()), float(expected.abs().max())


def metadata_of(
    config: dict[str, Any],
    size: tuple[int, int],
    batch: int | None,
    dtype: torch.dtype,
    class_names: Sequence[str] | None,
) -> Metadata:
    """Facts that whoever runs a file has to know; JSON but for plain words."""
    found = {name: config[name] for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    found |= {"size": size, "batch": batch or "dynamic", "dtype": str(dtype).removeprefix("torch.")}
    if class_names is not None:
        found["class_names"] = list(class_names)
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}
