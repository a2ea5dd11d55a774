"""Figures of windows, receptive fields, plans and attention.

Every function draws on the axes it is given, or on a figure of its own, and returns the figure. Figures live outside
pyplot, so nothing has to be closed. What is drawn comes from `Geometry`, `Plan` and `receptive_field`.

Orange is always a query and blue a key: told apart by every kind of colour vision, and by their brightness. Maps of
numbers use cividis, the darker the larger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import zip_longest
from math import ceil, prod
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from dinat_triton.files import replacing
from dinat_triton.geometry import Geometry, IntArray
from dinat_triton.plan import MASKED, Plan
from dinat_triton.receptive_field import Field, Layer, field, growth
from dinat_triton.words import counted

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


# Neighborhoods


def neighborhood(geometry: Geometry, position: Position, inverse: bool = False) -> IntArray:
    """What each token of the map is to the one at a position: OTHER, SEEN or SELF."""
    cells = np.full(geometry.num_tokens, OTHER)
    cells[geometry.queries_of(position) if inverse else geometry.keys_of(position)] = SEEN
    cells = cells.reshape(geometry.shape)
    cells[tuple(position)] = SELF
    return cells


@styled
def plot_neighborhood(
    geometry: Geometry, position: Position, ax: Axes | None = None, *, inverse: bool = False, title: str | None = None
) -> Figure:
    """The keys that a query sees, or with `inverse` the queries that see a key.

    Args:
        geometry: One to three axes; the depth of a 3-D map is laid out as slices side by side.
        position: Of the query, or of the key.
        ax: Where to draw.
        inverse: Whether the position is a key's.
        title: Above the map; by default how many tokens are marked.
    """
    cells = neighborhood(geometry, position, inverse)
    ax = ax or _canvas(cells.shape)
    _draw_states(ax, cells, KEY, QUERY) if not inverse else _draw_states(ax, cells, QUERY, KEY)
    _mark(ax, geometry.shape, position, PAPER if inverse else INK)
    if title is None:
        count = len(geometry.queries_of(position) if inverse else geometry.keys_of(position))
        title = f"seen by {counted(count, 'query')}" if inverse else f"sees {counted(count, 'key')}"
    _title(ax, title)
    return _figure(ax)


@styled
def plot_neighborhoods(
    panels: Sequence[tuple[str, Geometry, Position]], columns: int = 4, *, inverse: bool = False
) -> Figure:
    """Several neighborhoods in a grid, each with its title."""
    shape = _mosaic_shape(panels[0][1].shape)
    rows = ceil(len(panels) / columns)
    width = 8.6 / columns
    layout = ConstrainedLayoutEngine(wspace=0.05)
    figure = Figure(figsize=(8.6, rows * (width * shape[0] / shape[1] + 0.3)), layout=layout)
    grid = figure.subplots(rows, columns, squeeze=False)
    for ax, panel in zip_longest(grid.flat, panels):
        if panel is None:
            ax.set_axis_off()
        else:
            title, geometry, position = panel
            plot_neighborhood(geometry, position, ax, inverse=inverse, title=title)
    return figure


@styled
def plot_dilations(shape: Position, kernel_size: int = 3, dilations: Sequence[int] = (1, 2, 4, 8)) -> Figure:
    """NAT beside DiNAT: the keys of a query in the middle, at a border and in a corner, for growing dilations."""
    centre = tuple(n // 2 for n in shape)
    places = {"centre": centre, "border": (0, *centre[1:]), "corner": (0,) * len(shape)}
    panels = [
        (
            f"{'NAT' if d == 1 else 'DiNAT'}, dilation {d}, {place}",
            Geometry(tuple(shape), (kernel_size,), (d,)),
            at,
        )
        for place, at in places.items()
        for d in dilations
    ]
    return plot_neighborhoods(panels, len(dilations))


@styled
def plot_pairs(geometry: Geometry, ax: Axes | None = None) -> Figure:
    """Every (query, key) pair of a small map as a matrix, the shade telling its place in the bias table."""
    if geometry.num_tokens > 512:
        raise ValueError(f"pairs are drawn for maps of up to 512 tokens, got {geometry.num_tokens}")
    tokens, offsets = geometry.neighbors()
    pairs = np.full((geometry.num_tokens, geometry.num_tokens), MASKED)
    rows, places = np.nonzero(tokens >= 0)
    pairs[rows, tokens[rows, places]] = offsets[rows, places]
    ax = ax or _canvas(pairs.shape)
    _draw_relative(ax, pairs, geometry.num_offsets)
    ax.set(xlabel="key", ylabel="query")
    return _figure(ax)


# Receptive fields


@styled
def plot_field(reached: Field, ax: Axes | None = None, *, heat: bool = False, title: str | None = None) -> Figure:
    """The inputs that reach a token, or with `heat` the share that each contributes if every layer averages."""
    ax = ax or _canvas(reached.mask.shape)
    if heat:
        colours = HEAT.with_extremes(under=CELL)
        _draw_cells(ax, np.where(reached.mask, reached.heat, -1), colours, Normalize(0, float(reached.heat.max())))
    else:
        _draw_states(ax, reached.mask.astype(int), KEY, QUERY)
    _title(ax, f"{reached.coverage:.3g} % of the map" if title is None else title)
    return _figure(ax)


@styled
def plot_receptive_fields(
    stacks: Mapping[str, Sequence[Layer]], token: Position | None = None, *, heat: bool = False
) -> Figure:
    """How receptive fields grow: a row per stack, a column per depth."""
    depth = max(map(len, stacks.values()))
    figure = Figure(figsize=(max(1.5 * depth, 3), 1.75 * len(stacks) + 0.2), layout="constrained")
    grid = figure.subplots(len(stacks), depth, squeeze=False)
    for row, (name, layers) in zip(grid, stacks.items(), strict=True):
        for number, (ax, reached) in enumerate(zip_longest(row, growth(layers, token)), 1):
            if reached is None:
                ax.set_axis_off()
                continue
            plot_field(reached, ax, heat=heat, title=f"{number} layer{'s' * (number > 1)}: {reached.coverage:.3g} %")
        row[0].set_ylabel(name)
    return figure


@styled
def plot_growth(stacks: Mapping[str, Sequence[Layer]], token: Position | None = None, ax: Axes | None = None) -> Figure:
    """Tokens in the receptive field against depth, one line per stack."""
    ax = ax or Figure(figsize=(4.6, 3.2), layout="constrained").add_subplot()
    for number, (name, layers) in enumerate(stacks.items()):
        sizes = [reached.coverage for reached in growth(layers, token)]
        look = LINES[number % 3] | {"linestyle": DASHES[number % 3]}
        ax.plot(range(1, len(sizes) + 1), sizes, label=name, **look)
    ax.set(xlabel="layers", ylabel="receptive field, % of the map", ylim=(0, 104))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="best")
    return _figure(ax)


@styled
def plot_cone(layers: Sequence[Layer], token: Position | None = None, ax: Axes | None = None) -> Figure:
    """A stack on a 1-D map: which tokens reach one output, layer by layer, and along which connections."""
    if any(len(layer.links) != 1 for layer in layers):
        raise ValueError("a cone is drawn for stacks on 1-D maps")
    size = layers[0].links[0].shape[1]
    ax = ax or Figure(figsize=(7, 0.55 * len(layers) + 0.7), layout="constrained").add_subplot()
    reached = [field(layers[depth:], token).mask for depth in range(len(layers))]
    reached.append(field(layers[-1:], token).mask & False)
    reached[-1][layers[-1].shape[0] // 2 if token is None else token[0]] = True
    for depth, layer in enumerate(layers):
        outputs, inputs = np.nonzero(layer.links[0] & reached[depth + 1][:, None])
        lines = [np.array([(i, depth), (o, depth + 1)]) for o, i in zip(outputs, inputs, strict=True)]
        ax.add_collection(LineCollection(lines, colors=KEY, linewidths=0.7, alpha=0.6, zorder=1))
    for depth, mask in enumerate(reached):
        colours = np.where(mask, QUERY if depth == len(layers) else KEY, CELL)
        ax.scatter(np.arange(len(mask)), np.full(len(mask), depth), c=colours, s=min(26, 3000 / size), zorder=2)
    ax.set_yticks(range(len(layers) + 1), ["input", *(f"layer {n + 1}" for n in range(len(layers)))])
    ax.set(xticks=[], xlim=(-1, size), ylim=(-0.4, len(layers) + 0.4))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    _title(ax, f"{int(reached[0].sum())} of {size} tokens reach the last layer's token")
    return _figure(ax)


# Plans


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
    """What each token is to the tile that holds a row: SELF for its rows, SEEN for what else it loads, or OTHER."""
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
    ax = ax or _canvas(classes.shape)
    count = len(plan.classes)
    _draw_cells(ax, classes, HEAT, Normalize(-0.5, max(count - 0.5, 0.5)))
    mosaic = _mosaic(classes)
    for number in range(count):
        cells = np.argwhere(mosaic == number)
        nearest = abs(cells - cells.mean(0)).sum(1).argmin()
        shade = PAPER if number >= count / 3 else INK
        for y, x in cells if mosaic.size <= 200 else cells[[nearest]]:
            ax.text(x + 0.5, y + 0.5, f"{number}", ha="center", va="center", fontsize=6, color=shade)
    _title(ax, f"{counted(plan.num_tiles, 'tile')} in {counted(count, 'class')}")
    return _figure(ax)


@styled
def plot_tile(plan: Plan, row: Position | None = None, ax: Axes | None = None) -> Figure:
    """One tile on the map: its rows, and the columns it loads. By default the tile in the middle."""
    row = _middle(plan) if row is None else row
    cells = tile_cells(plan, row)
    ax = ax or _canvas(cells.shape)
    _draw_states(ax, cells, QUERY, KEY) if plan.transposed else _draw_states(ax, cells, KEY, QUERY)
    rows, columns = tile_tokens(plan, row)
    for token in rows:
        _mark(ax, plan.geometry.shape, np.unravel_index(token, plan.geometry.shape), PAPER if plan.transposed else INK)
    names = ("key", "query") if plan.transposed else ("query", "key")
    _title(ax, f"a tile of {counted(len(rows), names[0])} loads {counted(len(columns), names[1])}")
    return _figure(ax)


@styled
def plot_tile_pairs(plan: Plan, number: int, ax: Axes | None = None) -> Figure:
    """The picture that the tiles of a class share: who sees whom, and by which entry of the bias."""
    rel = plan.classes[number].rel()
    ax = ax or _canvas(rel.shape)
    _draw_relative(ax, rel, plan.geometry.num_offsets)
    useful = int((rel != MASKED).sum())
    ax.set(xlabel="columns loaded", ylabel="rows", aspect="auto")
    _title(ax, f"class {number}: {useful} of {rel.size} scores useful")
    return _figure(ax)


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
    return _figure(ax)


# Bias and attention


@styled
def plot_bias(rpb: ArrayLike, columns: int = 4) -> Figure:
    """A relative positional bias `[heads, *bias_shape]`, one panel per head on a common scale."""
    values = np.asarray(rpb, dtype=float)
    if not 2 <= values.ndim <= 4:
        raise ValueError(f"rpb must be [heads, 2 * kernel_size - 1 per axis], got shape {values.shape}")
    scale = Normalize(float(values.min()), float(values.max()) + 1e-12)
    if values.ndim == 2:
        ax = _canvas(values.shape)
        mesh = _draw_cells(ax, values, HEAT, scale)
        ax.set(xlabel="offset", ylabel="head")
        _figure(ax).colorbar(mesh, ax=ax, label="bias", shrink=0.8)
        return _figure(ax)
    columns = min(columns, len(values))
    rows = ceil(len(values) / columns)
    height, width = _mosaic_shape(values.shape[1:])
    panel = 7.4 / columns if values.ndim == 4 else min(1.8, 7.4 / columns)
    figure = Figure(figsize=(panel * columns + 0.9, rows * (panel * height / width + 0.3)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for head, ax in enumerate(grid.flat):
        if head >= len(values):
            ax.set_axis_off()
            continue
        mesh = _draw_cells(ax, values[head], HEAT, scale)
        _mark(ax, values.shape[1:], [n // 2 for n in values.shape[1:]])
        _title(ax, f"head {head}")
    figure.colorbar(mesh, ax=grid, label="bias", shrink=0.8)
    return figure


@styled
def plot_attention(
    image: ArrayLike,
    maps: Mapping[str, ArrayLike],
    queries: Mapping[str, Position],
    heads: Sequence[int] | None = None,
) -> Figure:
    """Where a query attends, drawn back on the picture: a row per layer, its mean over the heads and each head.

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
            _title(ax, title)
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
    _bare(ax)


# Characters


def text_cells(cells: ArrayLike, marks: str = ".#@") -> str:
    """Cells in characters, for a terminal: `.` other, `#` seen, `@` the token itself; slices of 3-D side by side."""
    mosaic = _mosaic(np.asarray(cells))
    return "\n".join(" ".join(" " if np.isnan(v) else marks[int(v)] for v in line) for line in mosaic)


def text_heat(values: ArrayLike) -> str:
    """Numbers in characters, from ` ` for nothing to `@` for the largest."""
    mosaic = _mosaic(np.asarray(values, dtype=float))
    ramp = ".:-=+*#%@"
    level = np.ceil(mosaic / np.nanmax(mosaic) * len(ramp))
    return "\n".join(" ".join(" " if np.isnan(v) or v < 1 else ramp[int(v) - 1] for v in line) for line in level)


# Drawing


def _middle(plan: Plan) -> tuple[int, ...]:
    return tuple(n // 2 for n in plan.geometry.shape)


def _canvas(shape: Sequence[int]) -> Axes:
    height, width = _mosaic_shape(shape)
    scale = min(0.28, 7.5 / width, 5 / height)
    size = max(width * scale, 2.2), max(height * scale, 0.35) + 0.35
    return Figure(figsize=size, layout="constrained").add_subplot()


def _figure(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def _title(ax: Axes, title: str) -> None:
    slices = any(text.get_text().startswith("slice") for text in ax.texts)
    ax.set_title(title, pad=12 if slices else 4)


def _bare(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set_visible(False)


def _mosaic_shape(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) == 1:
        return 1, shape[0]
    if len(shape) == 2:
        return shape[0], shape[1]
    return shape[1], shape[0] * (shape[2] + 1) - 1


def _mosaic(values: NDArray) -> NDArray[np.float64]:
    """A map of one to three axes as one picture: 3-D maps as slices with a gap of NaN between them."""
    mosaic = np.full(_mosaic_shape(values.shape), np.nan)
    if values.ndim < 3:
        mosaic[:] = values
    else:
        width = values.shape[2] + 1
        for number, plane in enumerate(values):
            mosaic[:, number * width : number * width + values.shape[2]] = plane
    return mosaic


def _draw_cells(ax: Axes, values: NDArray, colours: Any, scale: Normalize):
    """A map as cells. Vectors as long as the cells are few; the lines between them vanish as they become many."""
    mosaic = _mosaic(values)
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
    _bare(ax)
    if values.ndim == 3:
        for number in range(values.shape[0]):
            x = number * (values.shape[2] + 1) + values.shape[2] / 2
            ax.text(x, -0.15, f"slice {number}", ha="center", va="bottom", fontsize=7)
    return mesh


def _draw_states(ax: Axes, cells: NDArray, seen: str, itself: str) -> None:
    _draw_cells(ax, cells, ListedColormap([CELL, seen, itself]), BoundaryNorm([-0.5, 0.5, 1.5, 2.5], 3))


def _draw_relative(ax: Axes, rel: NDArray, num_offsets: int) -> None:
    """Pairs coloured by bias index, masked ones left pale."""
    ax.set_facecolor(CELL)
    values = np.ma.masked_equal(rel, MASKED)
    edges = np.arange(rel.shape[1] + 1), np.arange(rel.shape[0] + 1)
    mesh = ax.pcolormesh(*edges, values, cmap=HEAT, norm=Normalize(0, num_offsets - 1), rasterized=rel.size > 1600)
    ax.set(xlim=(0, rel.shape[1]), ylim=(rel.shape[0], 0), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    _figure(ax).colorbar(mesh, ax=ax, label="bias index", shrink=0.8)


def _mark(ax: Axes, shape: Sequence[int], position: Position, colour: str = INK) -> None:
    """A dot on a token, so that it is found without colours."""
    *depth, x = ((0,) * (2 - len(shape)) + tuple(position)) if len(shape) < 3 else position
    y = depth[-1]
    offset = depth[0] * (shape[2] + 1) if len(shape) == 3 else 0
    size = min(14.0, 2500 / prod(_mosaic_shape(shape)) + 1)
    rim = INK if colour == PAPER else PAPER
    ax.scatter([x + offset + 0.5], [y + 0.5], s=size, color=colour, edgecolors=rim, linewidths=size / 28, zorder=3)
