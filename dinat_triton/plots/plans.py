"""Figures of plans: tile classes, what a tile loads, its scores, and what tiles cost."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from dinat_triton.geometry import Geometry, IntArray
from dinat_triton.plan import MASKED, Plan
from dinat_triton.plots.drawing import (
    HEAT,
    INK,
    KEY,
    LINES,
    OTHER,
    PAPER,
    QUERY,
    SEEN,
    SELF,
    Position,
    canvas,
    draw_cells,
    draw_relative,
    draw_states,
    figure_of,
    mark_token,
    mosaic_of,
    set_title,
    styled,
)
from dinat_triton.words import counted


def tile_of(plan: Plan, row: Position) -> tuple[int, int]:
    """The tile that holds a row: its class, and its place among that class's tiles."""
    token = plan.geometry.token_at(row)
    for number, tiles in enumerate(plan.classes):
        found = np.flatnonzero(np.isin(token - tiles.row_base, tiles.rows))
        if len(found):
            return number, int(found[0])
    raise AssertionError(f"no tile of the plan holds {row}")


def tile_tokens(plan: Plan, row: Position) -> tuple[IntArray, IntArray]:
    """Rows of the tile that holds a row, and the columns it loads."""
    number, place = tile_of(plan, row)
    tiles = plan.classes[number]
    return tiles.row_base[place] + tiles.rows, tiles.col_base[place] + tiles.columns


def tile_cells(plan: Plan, row: Position) -> IntArray:
    """Marks the tile that holds a row: SELF for its rows, SEEN for what else it loads, OTHER elsewhere."""
    rows, columns = tile_tokens(plan, row)
    cells = np.full(plan.geometry.num_tokens, OTHER)
    cells[columns] = SEEN
    cells[rows] = SELF
    return cells.reshape(plan.geometry.shape)


def class_map(plan: Plan) -> IntArray:
    """The class of the tile that holds each token of the map."""
    classes = np.empty(plan.geometry.num_tokens, dtype=np.int64)
    for number, tiles in enumerate(plan.classes):
        classes[np.add.outer(tiles.row_base, tiles.rows)] = number
    return classes.reshape(plan.geometry.shape)


@styled
def plot_classes(plan: Plan, ax: Axes | None = None) -> Figure:
    """The map in its tile classes: tiles with the same number share one picture of who sees whom."""
    classes = class_map(plan)
    ax = ax or canvas(classes.shape)
    count = len(plan.classes)
    draw_cells(ax, classes, HEAT, Normalize(-0.5, max(count - 0.5, 0.5)))
    mosaic = mosaic_of(classes)
    for number in range(count):
        cells = np.argwhere(mosaic == number)
        nearest = abs(cells - cells.mean(0)).sum(1).argmin()
        shade = PAPER if number >= count / 3 else INK
        for y, x in cells if mosaic.size <= 200 else cells[[nearest]]:
            ax.text(x + 0.5, y + 0.5, f"{number}", ha="center", va="center", fontsize=6, color=shade)
    set_title(ax, f"{counted(plan.num_tiles, 'tile')} in {counted(count, 'class')}")
    return figure_of(ax)


@styled
def plot_tile(plan: Plan, row: Position | None = None, ax: Axes | None = None) -> Figure:
    """One tile on the map: its rows, and the columns it loads. By default the tile in the middle."""
    row = _middle(plan) if row is None else row
    cells = tile_cells(plan, row)
    ax = ax or canvas(cells.shape)
    draw_states(ax, cells, QUERY, KEY) if plan.transposed else draw_states(ax, cells, KEY, QUERY)
    rows, columns = tile_tokens(plan, row)
    for token in rows:
        mark_token(
            ax, plan.geometry.shape, np.unravel_index(token, plan.geometry.shape), PAPER if plan.transposed else INK
        )
    names = ("key", "query") if plan.transposed else ("query", "key")
    set_title(ax, f"a tile of {counted(len(rows), names[0])} loads {counted(len(columns), names[1])}")
    return figure_of(ax)


@styled
def plot_tile_pairs(plan: Plan, number: int, ax: Axes | None = None) -> Figure:
    """The picture that the tiles of a class share: who sees whom, and by which entry of the bias."""
    rel = plan.classes[number].rel()
    ax = ax or canvas(rel.shape)
    draw_relative(ax, rel, plan.geometry.num_offsets)
    useful = int((rel != MASKED).sum())
    ax.set(xlabel="columns loaded", ylabel="rows", aspect="auto")
    set_title(ax, f"class {number}: {useful} of {rel.size} scores useful")
    return figure_of(ax)


@styled
def plot_plan(plan: Plan, row: Position | None = None) -> Figure:
    """A plan at a glance: its classes, one tile and what it loads, and that tile's scores."""
    row = _middle(plan) if row is None else row
    if plan.geometry.rank == 2:
        figure = Figure(figsize=(8.6, 3.1), layout="constrained")
        axes = figure.subplots(1, 3)
    else:
        figure = Figure(figsize=(8.6, 4.6), layout="constrained")
        axes = figure.subplots(3, 1, height_ratios=[1, 1, 2.5])
    plot_classes(plan, axes[0])
    plot_tile(plan, row, axes[1])
    plot_tile_pairs(plan, tile_of(plan, row)[0], axes[2])
    return figure


@styled
def plot_cost(geometry: Geometry, tiles: Sequence[Sequence[int]] | None = None, ax: Axes | None = None) -> Figure:
    """Work per query over tile sizes: scores evaluated and keys loaded, against the scores that attend."""
    if tiles is None:
        longest = max(ceil(n / d) for n, d in zip(geometry.shape, geometry.dilation, strict=True))
        tiles = [(edge,) * geometry.rank for edge in range(1, min(longest, 16) + 1)]
    costs = [Plan(geometry, tuple(tile)).cost() for tile in tiles]
    ax = ax or Figure(figsize=(4.6, 3.2), layout="constrained").add_subplot()
    at = range(len(tiles))
    ax.plot(at, [c.scores_per_query for c in costs], label="scores evaluated", linestyle="-", **LINES[0])
    ax.plot(at, [c.col_loads / c.queries for c in costs], label="keys loaded", linestyle="--", **LINES[1])
    ax.axhline(costs[0].useful_per_query, color=INK, linestyle=":", label="scores that attend")
    ax.set_xticks(at, ["x".join(map(str, tile)) for tile in tiles], rotation=90 if len(tiles) > 6 else 0)
    ax.set(yscale="log", xlabel="tile", ylabel="per query")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8, columnspacing=1, handlelength=1.8)
    return figure_of(ax)


def _middle(plan: Plan) -> tuple[int, ...]:
    return tuple(n // 2 for n in plan.geometry.shape)
