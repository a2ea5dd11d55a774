"""Figures of a bias, and of attention on a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from dinat_triton.plots.drawing import (
    HEAT,
    INK,
    Position,
    canvas,
    draw_cells,
    figure_of,
    make_bare,
    mark_token,
    mosaic_shape,
    set_title,
    styled,
)


@styled
def plot_bias(rpb: ArrayLike, columns: int = 4) -> Figure:
    """A relative positional bias `[heads, *bias_shape]`, one panel per head on a common scale."""
    values = np.asarray(rpb, dtype=float)
    if not 2 <= values.ndim <= 4:
        raise ValueError(f"rpb must be [heads, 2 * kernel_size - 1 per axis], got shape {values.shape}")
    scale = Normalize(float(values.min()), float(values.max()) + 1e-12)
    if values.ndim == 2:
        ax = canvas(values.shape)
        mesh = draw_cells(ax, values, HEAT, scale)
        ax.set(xlabel="offset", ylabel="head")
        figure_of(ax).colorbar(mesh, ax=ax, label="bias", shrink=0.8)
        return figure_of(ax)
    columns = min(columns, len(values))
    rows = ceil(len(values) / columns)
    height, width = mosaic_shape(values.shape[1:])
    panel = 7.4 / columns if values.ndim == 4 else min(1.8, 7.4 / columns)
    figure = Figure(figsize=(panel * columns + 0.9, rows * (panel * height / width + 0.3)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for head, ax in enumerate(grid.flat):
        if head >= len(values):
            ax.set_axis_off()
            continue
        mesh = draw_cells(ax, values[head], HEAT, scale)
        mark_token(ax, values.shape[1:], [n // 2 for n in values.shape[1:]])
        set_title(ax, f"head {head}")
    figure.colorbar(mesh, ax=grid, label="bias", shrink=0.8)
    return figure


@styled
def plot_attention(
    image: ArrayLike,
    maps: Mapping[str, ArrayLike],
    queries: Mapping[str, Position],
    heads: Sequence[int] | None = None,
) -> Figure:
    """Draws back on the picture where a query attends: a row per layer, its mean over the heads and each head.

    Args:
        image: `[3, height, width]` or `[height, width, 3]`, between 0 and 1.
        maps: Probabilities `[heads, *map]` of each layer.
        queries: Where the query stands on each layer's map.
        heads: Which to show; by default the first three.
    """
    grey = _grey(image)
    layers = {name: np.asarray(values, dtype=float) for name, values in maps.items()}
    heads = range(min(3, *(len(values) for values in layers.values()), 3)) if heads is None else heads
    figure = Figure(figsize=(1.9 * (len(heads) + 1) + 0.4, 2.1 * len(layers)), layout="constrained")
    grid = figure.subplots(len(layers), len(heads) + 1, squeeze=False)
    for row, (name, values) in zip(grid, layers.items(), strict=True):
        panels = {"mean of heads": values.mean(0)} | {f"head {head}": values[head] for head in heads}
        for ax, (title, weights) in zip(row, panels.items(), strict=True):
            _draw_overlay(ax, grey, weights, queries[name])
            set_title(ax, title)
        row[0].set_ylabel(name.replace(": ", "\n"), fontsize=8)
    return figure


def _grey(image: ArrayLike) -> NDArray[np.float64]:
    pixels = np.asarray(image, dtype=float)
    if pixels.ndim != 3 or 3 not in (pixels.shape[0], pixels.shape[-1]):
        raise ValueError(f"image must be [3, height, width] or [height, width, 3], got shape {pixels.shape}")
    pixels = pixels if pixels.shape[-1] == 3 else np.moveaxis(pixels, 0, -1)
    return pixels @ np.array([0.299, 0.587, 0.114])


def _draw_overlay(ax: Axes, grey: NDArray, weights: NDArray, query: Position) -> None:
    """Attention over a picture that fades where nothing is attended to."""
    height, width = weights.shape
    ax.set_facecolor(INK)
    ax.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0), alpha=0.6, interpolation="none")
    seen = np.ma.masked_equal(weights, 0)
    edges = np.arange(width + 1), np.arange(height + 1)
    ax.pcolormesh(*edges, seen, cmap="inferno", norm=Normalize(0, weights.max()), alpha=0.85, rasterized=True)
    ax.add_patch(matplotlib.patches.Rectangle((query[1], query[0]), 1, 1, fill=False, edgecolor="white", linewidth=2.2))
    ax.add_patch(matplotlib.patches.Rectangle((query[1], query[0]), 1, 1, fill=False, edgecolor=INK, linewidth=1.0))
    make_bare(ax)
