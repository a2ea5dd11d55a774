"""Dilations of every block of a model: published patterns by name, integers, or the largest that fit an image."""

from collections.abc import Sequence
from itertools import cycle, islice
from math import ceil

# By what they were published for: a pattern per level, repeated over the level's blocks.
DILATIONS: dict[str, list[list[int]]] = {
    "224": [[1, 8], [1, 4], [1, 2], [1]],
    "384": [[1, 13], [1, 6], [1, 3], [1]],
    "coco": [[1, 28], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3]],
    "ade20k": [[1, 16], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2]],
    "ade20k_640": [[1, 20], [1, 5, 1, 10], [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5], [1, 2]],
    "mask2former": [[1, 14], [1, 4, 1, 7], [1, 2, 1, 3] * 4 + [1, 3], [1]],
}

Dilation = int | Sequence[int]
Dilations = int | str | Sequence[int | Sequence[Dilation]]


def resolve_dilations(
    dilations: Dilations,
    depths: Sequence[int],
    img_size: int | tuple[int, int] | None,
    reductions: Sequence[int],
    kernel_size: int,
) -> list[list[Dilation]]:
    """The dilation of every block of every level.

    Args:
        dilations: As `DiNAT` takes them.
        depths: Blocks of each level.
        img_size: What "auto" fits.
        reductions: Of each level's map against the image.
        kernel_size: Of all blocks.
    """
    levels: Sequence[int | Sequence[Dilation]]
    if isinstance(dilations, int):
        levels = [dilations] * len(depths)
    elif isinstance(dilations, str):
        levels = _named_dilations(dilations, depths, img_size, reductions, kernel_size)
    else:
        levels = dilations
    counts = [depth if isinstance(level, int) else len(level) for level, depth in zip(levels, depths, strict=False)]
    if len(levels) != len(depths) or counts != list(depths):
        raise ValueError(
            f"dilations must hold an integer or a list of one dilation per block for each level of depths "
            f"{tuple(depths)}, got {dilations!r}"
        )
    return [
        [level] * depth if isinstance(level, int) else list(level) for level, depth in zip(levels, depths, strict=True)
    ]


def _named_dilations(
    name: str,
    depths: Sequence[int],
    img_size: int | tuple[int, int] | None,
    reductions: Sequence[int],
    kernel_size: int,
) -> list[list[Dilation]]:
    patterns: Sequence[Sequence[Dilation]]
    if name == "auto":
        if img_size is None:
            raise ValueError("dilations='auto' fits an image: pass img_size too")
        patterns = [[1, largest_dilation(img_size, reduction, kernel_size)] for reduction in reductions]
    elif name in DILATIONS:
        patterns = DILATIONS[name]
    else:
        names = ", ".join(map(repr, ["auto", *DILATIONS]))
        raise ValueError(f"dilations must be one of {names}, or integers, got {name!r}")
    if len(patterns) < len(depths):
        raise ValueError(f"dilations={name!r} has {len(patterns)} levels, depths {tuple(depths)} need more")
    return [repeated(pattern, depth) for pattern, depth in zip(patterns, depths, strict=False)]


def repeated(pattern: Sequence[Dilation], depth: int) -> list[Dilation]:
    """A pattern repeated over the blocks of a level."""
    return list(islice(cycle(pattern), depth))


def largest_dilation(img_size: int | tuple[int, int], reduction: int, kernel_size: int) -> Dilation:
    """The largest dilation whose window fits a level's map, on each axis."""
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    height, width = (max(1, ceil(side / reduction) // kernel_size) for side in sides)
    return height if height == width else (height, width)
