"""Parts that all figures share: colours, style, files, and maps of one to three axes as cells.

Orange is always a query and blue a key: told apart by every kind of colour vision, and by their brightness. Maps of
numbers use cividis, the darker the larger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from math import prod
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dinat_triton.files import replacing
from dinat_triton.plan import MASKED

PAPER, INK, CELL = "#ffffff", "#222222", "#e9e9e9"
KEY, QUERY = "#0072b2", "#e69f00"
# From light to dark, and never as light as a cell that shows nothing.
HEAT = ListedColormap(matplotlib.colormaps["cividis"](np.linspace(0.82, 0, 256)), name="dark cividis")
OTHER, SEEN, SELF = 0, 1, 2  # what a cell of a neighborhood shows
LINES: tuple[dict[str, Any], ...] = (
    {"color": KEY, "marker": "o"},
    {"color": QUERY, "marker": "s"},
    {"color": INK, "marker": "^"},
)
DASHES = ("-", "--", ":")

STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.hashsalt": "dinat-triton",  # the same figure gives the same file
    "pdf.fonttype": 42,
}

Position = Sequence[int]
P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure; the file's ending chooses between png, svg and pdf."""
    path = Path(path)
    kind = path.suffix.lower()
    stamps: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}
    if kind not in stamps:
        raise ValueError(f"a figure's file must end in .png, .svg or .pdf, got {str(path)!r}")
    with matplotlib.rc_context(STYLE), replacing(path) as beside:
        figure.savefig(beside, metadata=stamps[kind])


def canvas(shape: Sequence[int]) -> Axes:
    height, width = mosaic_shape(shape)
    scale = min(0.28, 7.5 / width, 5 / height)
    size = max(width * scale, 2.2), max(height * scale, 0.35) + 0.35
    return Figure(figsize=size, layout="constrained").add_subplot()


def figure_of(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def set_title(ax: Axes, title: str) -> None:
    slices = any(text.get_text().startswith("slice") for text in ax.texts)
    ax.set_title(title, pad=12 if slices else 4)


def make_bare(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set_visible(False)


def mosaic_shape(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) == 1:
        return 1, shape[0]
    if len(shape) == 2:
        return shape[0], shape[1]
    return shape[1], shape[0] * (shape[2] + 1) - 1


def mosaic_of(values: NDArray) -> NDArray[np.float64]:
    """A map of one to three axes as one picture: 3-D maps as slices with a gap of NaN between them."""
    mosaic = np.full(mosaic_shape(values.shape), np.nan)
    if values.ndim < 3:
        mosaic[:] = values
    else:
        width = values.shape[2] + 1
        for number, plane in enumerate(values):
            mosaic[:, number * width : number * width + values.shape[2]] = plane
    return mosaic


def draw_cells(ax: Axes, values: NDArray, colours: Any, scale: Normalize):
    """A map as cells. Vectors as long as the cells are few; the lines between them vanish as they become many."""
    mosaic = mosaic_of(values)
    height, width = mosaic.shape
    many = max(height, width) > 40
    # Cells that show nothing, as the gaps between slices do, take the colour of the paper.
    mesh = ax.pcolormesh(
        np.arange(width + 1),
        np.arange(height + 1),
        np.ma.masked_invalid(mosaic),
        cmap=colours,
        norm=scale,
        edgecolors="none" if many else PAPER,
        linewidth=0 if many else 0.6,
        rasterized=many,
    )
    ax.set(xlim=(0, width), ylim=(height, 0))
    make_bare(ax)
    if values.ndim == 3:
        for number in range(values.shape[0]):
            x = number * (values.shape[2] + 1) + values.shape[2] / 2
            ax.text(x, -0.15, f"slice {number}", ha="center", va="bottom", fontsize=7)
    return mesh


def draw_states(ax: Axes, cells: NDArray, seen: str, itself: str) -> None:
    draw_cells(ax, cells, ListedColormap([CELL, seen, itself]), BoundaryNorm([-0.5, 0.5, 1.5, 2.5], 3))


def mark_token(ax: Axes, shape: Sequence[int], position: Position, colour: str = INK) -> None:
    """A dot on a token, so that it is found without colours."""
    *depth, x = ((0,) * (2 - len(shape)) + tuple(position)) if len(shape) < 3 else position
    y = depth[-1]
    offset = depth[0] * (shape[2] + 1) if len(shape) == 3 else 0
    size = min(14.0, 2500 / prod(mosaic_shape(shape)) + 1)
    rim = INK if colour == PAPER else PAPER
    ax.scatter([x + offset + 0.5], [y + 0.5], s=size, color=colour, edgecolors=rim, linewidths=size / 28, zorder=3)


def draw_relative(ax: Axes, rel: NDArray, num_offsets: int) -> None:
    """Pairs coloured by bias index, masked ones left pale."""
    ax.set_facecolor(CELL)
    values = np.ma.masked_equal(rel, MASKED)
    edges = np.arange(rel.shape[1] + 1), np.arange(rel.shape[0] + 1)
    mesh = ax.pcolormesh(*edges, values, cmap=HEAT, norm=Normalize(0, num_offsets - 1), rasterized=rel.size > 1600)
    ax.set(xlim=(0, rel.shape[1]), ylim=(rel.shape[0], 0), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    figure_of(ax).colorbar(mesh, ax=ax, label="bias index", shrink=0.8)
