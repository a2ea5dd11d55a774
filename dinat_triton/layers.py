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

# Layers of others, without a bias: map, window, stride, heads, channels of a head. The `small` ones suit a CPU.
OTHERS: dict[str, list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, int]]] = {
    "ltx@decoder": [  # of a video model
        ((18, 32, 48), (3, 7, 7), (1, 1, 1), 32, 64),
        ((36, 64, 96), (3, 5, 5), (1, 1, 1), 8, 64),
        ((79, 192, 192), (11, 11, 11), (1, 1, 1), 4, 64),
    ],
    "ltx@small": [
        ((9, 16, 24), (3, 7, 7), (1, 1, 1), 8, 64),
        ((12, 24, 32), (3, 5, 5), (1, 1, 1), 2, 64),
        ((16, 24, 24), (11, 11, 11), (1, 1, 1), 1, 64),
    ],
    "natten@tables": [  # of NATTEN's own tables
        ((32768,), (2048,), (1,), 1, 128),
        ((256, 256), (80, 80), (1, 1), 24, 128),
        ((256, 256), (80, 80), (16, 16), 24, 128),
        ((30, 48, 80), (18, 24, 24), (1, 1, 1), 24, 128),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), 24, 128),
    ],
    "natten@small": [
        ((8192,), (512,), (1,), 1, 128),
        ((64, 64), (20, 20), (1, 1), 2, 128),
        ((64, 64), (20, 20), (4, 4), 2, 128),
        ((10, 16, 24), (6, 8, 8), (1, 1, 1), 2, 128),
        ((10, 16, 24), (6, 8, 8), (5, 4, 4), 2, 128),
    ],
}


@dataclass(frozen=True)
class Layer:
    """One attention layer of a model on a batch of images.

    Attributes:
        name: Model, setting, map and window, such as `dinat_mini@224/56x56-d8` or `ltx@decoder/18x32x48-k3x7x7`.
        shape: Tokens along each axis.
        heads: Attention heads.
        dilation: Along each axis.
        count: How often the model has it.
        kernel_size: Along each axis.
        dim: Channels of a head.
        batch: Images.
        stride: Along each axis; 1 by default.
        has_bias: Whether it has a relative positional bias.
    """

    name: str
    shape: tuple[int, ...]
    heads: int
    dilation: tuple[int, ...]
    count: int = 1
    kernel_size: tuple[int, ...] = (KERNEL_SIZE, KERNEL_SIZE)
    dim: int = HEAD_DIM
    batch: int = 1
    stride: tuple[int, ...] = ()
    has_bias: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", self.stride or (1,) * len(self.shape))

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.shape, self.kernel_size, self.dilation, self.stride)

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
        """Map and window, such as `56x56-d8`."""
        return self.name.partition("/")[2]

    def __str__(self) -> str:
        return f"{self.name} h{self.heads} b{self.batch}"


def layers_of(name: str, dim: int | None = None, batch: int = 1) -> list[Layer]:
    """The distinct layers of a model at a setting.

    Args:
        name: Such as `dinat_mini@224` or `ltx@decoder`.
        dim: Channels of a head; the model's by default.
        batch: Images; `coco` takes an eighth of them, and at least one.
    """
    if name in OTHERS:
        return [_other(name, *numbers, dim, batch) for numbers in OTHERS[name]]
    model, _, setting = name.partition("@")
    if model not in SIZES or setting not in SETTINGS:
        ours = f"{{{','.join(SIZES)}}}@{{{','.join(SETTINGS)}}}"
        raise ValueError(f"layers must be one of {ours}, {', '.join(OTHERS)}, got {name!r}")
    depths, heads = SIZES[model]
    image, patterns = SETTINGS[setting]
    batch = max(1, batch // COCO_BATCHES) if setting == "coco" else batch
    layers = []
    for level, (depth, pattern) in enumerate(zip(depths, patterns, strict=True)):
        shape = tuple(ceil(size / (4 << level)) for size in image)
        dilations = list(islice(cycle(pattern), depth))
        for d in sorted(set(dilations)):
            label, times = f"{name}/{_by(shape)}-d{d}", dilations.count(d)
            layers.append(Layer(label, shape, heads << level, (d, d), times, dim=dim or HEAD_DIM, batch=batch))
    return layers


def _other(
    name: str, shape: tuple[int, ...], kernel_size: tuple[int, ...], stride: tuple[int, ...], heads: int, own_dim: int,
    dim: int | None, batch: int,
) -> Layer:  # fmt: skip
    label = f"{name}/{_by(shape)}-k{_by(kernel_size)}" + (f"-s{_by(stride)}" if max(stride) > 1 else "")
    none = (1,) * len(shape)
    return Layer(label, shape, heads, none, 1, kernel_size, dim or own_dim, batch, stride, has_bias=False)


def _by(numbers: tuple[int, ...]) -> str:
    return "x".join(map(str, numbers))
