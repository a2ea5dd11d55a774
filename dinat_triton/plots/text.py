"""Maps in characters, for a terminal."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from dinat_triton.plots.drawing import (
    mosaic_of,
)


def text_cells(cells: ArrayLike, marks: str = ".#@") -> str:
    """Cells in characters, for a terminal: `.` other, `#` seen, `@` the token itself; slices of 3-D side by side."""
    mosaic = mosaic_of(np.asarray(cells))
    return "\n".join(" ".join(" " if np.isnan(v) else marks[int(v)] for v in line) for line in mosaic)


def text_heat(values: ArrayLike) -> str:
    """Numbers in characters, from ` ` for nothing to `@` for the largest."""
    mosaic = mosaic_of(np.asarray(values, dtype=float))
    ramp = ".:-=+*#%@"
    level = np.ceil(mosaic / np.nanmax(mosaic) * len(ramp))
    return "\n".join(" ".join(" " if np.isnan(v) or v < 1 else ramp[int(v) - 1] for v in line) for line in level)
