"""Seeded random geometries: small, odd, ragged, and always valid."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Half of all axes as in published models.
BORDERS = ("shift", "shift", "clip", "wrap")


@dataclass(frozen=True)
class Sample:
    """The arguments that decide who attends to whom, one value per axis."""

    shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    is_causal: tuple[bool, ...]
    border: tuple[str, ...] = ("shift", "shift", "shift")

    def __post_init__(self) -> None:
        object.__setattr__(self, "border", self.border[: self.rank])

    @property
    def rank(self) -> int:
        return len(self.shape)

    def kwargs(self) -> dict[str, Any]:
        """What `na1d`, `na2d` and `na3d` take beside the tensors."""
        return self.natten_kwargs() | {"border": self.border}

    def natten_kwargs(self) -> dict[str, Any]:
        """What NATTEN takes, whose windows always shift."""
        return {
            "kernel_size": self.kernel_size,
            "dilation": self.dilation,
            "stride": self.stride,
            "is_causal": self.is_causal,
        }


def sample(
    rng: random.Random,
    rank: int,
    *,
    max_tokens: int = 256,
    min_kernel: int = 1,
    strided: bool = True,
    borders: Sequence[str] = ("shift",),
) -> Sample:
    """One geometry of at most `max_tokens` tokens."""
    shape = _shape(rng, rank, max_tokens, min_kernel)
    border = tuple(rng.choice(borders) if len(borders) > 1 else borders[0] for _ in shape)
    axes = [_bordered(rng, size, *_axis(rng, size, min_kernel), b) for size, b in zip(shape, border, strict=True)]
    return Sample(
        shape=shape,
        kernel_size=tuple(k for k, _ in axes),
        dilation=tuple(d for _, d in axes),
        stride=tuple(_one_or_more(rng, k) if strided else 1 for k, _ in axes),
        is_causal=tuple(rng.random() < 0.4 for _ in shape),
        border=border,
    )


def samples(
    count: int, *, seed: int, ranks: Sequence[int] = (1, 2, 3), max_tokens: int = 256, **flags: Any
) -> list[Sample]:
    """`count` distinct geometries, the ranks taking turns; the flags are those of `sample`."""
    rng = random.Random(seed)
    found: dict[Sample, None] = {}
    for attempt in range(100 * count):
        if len(found) == count:
            return list(found)
        found[sample(rng, ranks[attempt % len(ranks)], max_tokens=max_tokens, **flags)] = None
    raise ValueError(f"{max_tokens=} and {flags} leave fewer than {count} distinct geometries")


def _shape(rng: random.Random, rank: int, max_tokens: int, smallest: int) -> tuple[int, ...]:
    """Uneven axes: each takes up to twice its fair share of what the others leave it."""
    sizes: list[int] = []
    for axis in range(rank):
        others = rank - axis - 1
        room = max_tokens // (math.prod(sizes) * smallest**others)
        share = math.floor(2 * (max_tokens / math.prod(sizes)) ** (1 / (others + 1)))
        sizes.append(rng.randint(smallest, max(smallest, min(room, share))))
    rng.shuffle(sizes)
    return tuple(sizes)


def _axis(rng: random.Random, size: int, smallest: int) -> tuple[int, int]:
    """Kernel and dilation; whichever is drawn first gets the room, and the largest that fits is drawn often."""
    dilation = _one_or_more(rng, size // smallest) if rng.random() < 0.6 else 1
    choices = range(smallest, size // dilation + 1)
    kernel = choices[-1] if rng.random() < 0.15 else rng.choice(choices)
    return kernel, dilation if dilation > 1 else _one_or_more(rng, size // kernel)


def _bordered(rng: random.Random, size: int, kernel: int, dilation: int, border: str) -> tuple[int, int]:
    """Clipped windows are often larger than the map; a circle's dilation divides it."""
    if border == "clip" and rng.random() < 0.5:
        return (2 * kernel, dilation) if rng.random() < 0.7 else (kernel, dilation + rng.randint(1, size))
    if border == "wrap":
        return kernel, rng.choice([d for d in range(1, dilation + 1) if size % d == 0])
    return kernel, dilation


def _one_or_more(rng: random.Random, largest: int) -> int:
    """1 or the largest one time in four each, otherwise anything between."""
    return rng.choice([1, largest, rng.randint(1, largest), rng.randint(1, largest)])
