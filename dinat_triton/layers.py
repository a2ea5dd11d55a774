"""The attention layers of published models as bare problems, for what plans and measures without a model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from math import ceil, prod

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
# Detection takes fewer images at a time, because they are larger.
COCO_BATCHES = 8


@dataclass(frozen=True)
class Layer:
    """One attention layer of a model on a batch of images.

    Attributes:
        name: Model, setting, map and dilation, such as `dinat_mini@224/56x56-d8`.
        shape: Tokens along each axis.
        heads: Attention heads.
        dilation: Along each axis.
        count: How often the model has it.
        kernel_size: Along each axis.
        dim: Channels of a head.
        batch: Images.
    """

    name: str
    shape: tuple[int, ...]
    heads: int
    dilation: tuple[int, ...]
    count: int = 1
    kernel_size: tuple[int, ...] = (KERNEL_SIZE, KERNEL_SIZE)
    dim: int = HEAD_DIM
    batch: int = 1

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.shape, self.kernel_size, self.dilation)

    @property
    def tokens(self) -> int:
        return prod(self.shape)

    @property
    def maps(self) -> int:
        return self.batch * self.heads

    @property
    def group(self) -> str:
        """Model and setting, such as `dinat_mini@224`."""
        return self.name.partition("/")[0]

    @property
    def short_name(self) -> str:
        """Map and dilation, such as `56x56-d8`."""
        return self.name.partition("/")[2]

    def __str__(self) -> str:
        return f"{self.name} h{self.heads} b{self.batch}"


def layers_of(name: str, dim: int = HEAD_DIM, batch: int = 1) -> list[Layer]:
    """The distinct layers of a model at a setting.

    Args:
        name: Such as `dinat_mini@224` or `dinat_large@coco`.
        dim: Channels of a head.
        batch: Images; `coco` takes an eighth of them, and at least one.
    """
    model, _, setting = name.partition("@")
    if model not in SIZES or setting not in SETTINGS:
        raise ValueError(f"layers must be one of {{{','.join(SIZES)}}}@{{{','.join(SETTINGS)}}}, got {name!r}")
    depths, heads = SIZES[model]
    image, patterns = SETTINGS[setting]
    batch = max(1, batch // COCO_BATCHES) if setting == "coco" else batch
    layers = []
    for level, (depth, pattern) in enumerate(zip(depths, patterns, strict=True)):
        shape = tuple(ceil(size / (4 << level)) for size in image)
        dilations = list(islice(cycle(pattern), depth))
        for d in sorted(set(dilations)):
            label = f"{name}/{'x'.join(map(str, shape))}-d{d}"
            layers.append(Layer(label, shape, heads << level, (d, d), dilations.count(d), dim=dim, batch=batch))
    return layers
