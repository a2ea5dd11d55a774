"""The attention layers of published models as bare problems, for what plans and measures without a model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from math import ceil

from dinat_triton.geometry import Geometry
from dinat_triton.models.dilations import DILATIONS
from dinat_triton.models.variants import VARIANTS

HEAD_DIM = 32
KERNEL_SIZE = 7

# Depths of the four levels, and heads of the first; they double from level to level.
SIZES: dict[str, tuple[tuple[int, ...], int]] = {
    name: (VARIANTS[name].args["depths"], VARIANTS[name].args["embed_dim"] // HEAD_DIM)
    for name in ("dinat_mini", "dinat_tiny", "dinat_small", "dinat_base", "dinat_large")
}

# Image size, and the pattern of dilations on each level.
SETTINGS = {
    name: (image, DILATIONS[name]) for name, image in (("224", (224, 224)), ("384", (384, 384)), ("coco", (800, 1216)))
}


@dataclass(frozen=True)
class Layer:
    """One attention layer of a model. `count` is how often the model has it."""

    name: str
    shape: tuple[int, ...]
    heads: int
    dilation: tuple[int, ...]
    count: int = 1
    kernel_size: tuple[int, ...] = (KERNEL_SIZE, KERNEL_SIZE)
    dim: int = HEAD_DIM

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.shape, self.kernel_size, self.dilation)


def layers_of(name: str, dim: int = HEAD_DIM) -> list[Layer]:
    """The distinct layers of a model at a setting, such as `dinat_mini@224` or `dinat_large@coco`."""
    model, _, setting = name.partition("@")
    if model not in SIZES or setting not in SETTINGS:
        raise ValueError(f"layers must be one of {{{','.join(SIZES)}}}@{{{','.join(SETTINGS)}}}, got {name!r}")
    depths, heads = SIZES[model]
    image, patterns = SETTINGS[setting]
    layers = []
    for level, (depth, pattern) in enumerate(zip(depths, patterns, strict=True)):
        shape = tuple(ceil(size / (4 << level)) for size in image)
        dilations = list(islice(cycle(pattern), depth))
        for d in sorted(set(dilations)):
            label = f"{setting}/{'x'.join(map(str, shape))}-d{d}"
            layers.append(Layer(label, shape, heads << level, (d, d), dilations.count(d), dim=dim))
    return layers
