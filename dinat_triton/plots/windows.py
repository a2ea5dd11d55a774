"""Figures of neighborhoods and of receptive fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from dinat_triton.geometry import Geometry, IntArray
from dinat_triton.plan import MASKED
from dinat_triton.plots.drawing import (
    CELL,
    DASHES,
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
    mosaic_shape,
    set_title,
    styled,
)
from dinat_triton.receptive_field import Field, TokenLinks, field, growth
from dinat_triton.words import counted


def neighborhood(geometry: Geometry, position: Position, inverse: bool = False) -> IntArray:
    """Marks each token of the map as OTHER, SEEN or SELF, as the one at a position has it."""
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
    ax = ax or canvas(cells.shape)
    draw_states(ax, cells, KEY, QUERY) if not inverse else draw_states(ax, cells, QUERY, KEY)
    mark_token(ax, geometry.shape, position, PAPER if inverse else INK)
    if title is None:
        count = len(geometry.queries_of(position) if inverse else geometry.keys_of(position))
        title = f"seen by {counted(count, 'query')}" if inverse else f"sees {counted(count, 'key')}"
    set_title(ax, title)
    return figure_of(ax)


@styled
def plot_neighborhoods(
    panels: Sequence[tuple[str, Geometry, Position]], columns: int = 4, *, inverse: bool = False
) -> Figure:
    """Several neighborhoods in a grid, each with its title."""
    shape = mosaic_shape(panels[0][1].shape)
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
    ax = ax or canvas(pairs.shape)
    draw_relative(ax, pairs, geometry.num_offsets)
    ax.set(xlabel="key", ylabel="query")
    return figure_of(ax)


@styled
def plot_field(reached: Field, ax: Axes | None = None, *, heat: bool = False, title: str | None = None) -> Figure:
    """The inputs that reach a token, or with `heat` the share that each contributes if every layer averages."""
    ax = ax or canvas(reached.mask.shape)
    if heat:
        colours = HEAT.with_extremes(under=CELL)
        draw_cells(ax, np.where(reached.mask, reached.heat, -1), colours, Normalize(0, float(reached.heat.max())))
    else:
        draw_states(ax, reached.mask.astype(int), KEY, QUERY)
    set_title(ax, f"{reached.coverage:.3g} % of the map" if title is None else title)
    return figure_of(ax)


@styled
def plot_receptive_fields(
    stacks: Mapping[str, Sequence[TokenLinks]], token: Position | None = None, *, heat: bool = False
) -> Figure:
    """Draws how receptive fields grow: a row per stack, a column per depth."""
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
def plot_growth(
    stacks: Mapping[str, Sequence[TokenLinks]], token: Position | None = None, ax: Axes | None = None
) -> Figure:
    """Tokens in the receptive field against depth, one line per stack."""
    ax = ax or Figure(figsize=(4.6, 3.2), layout="constrained").add_subplot()
    for number, (name, layers) in enumerate(stacks.items()):
        sizes = [reached.coverage for reached in growth(layers, token)]
        look = LINES[number % 3] | {"linestyle": DASHES[number % 3]}
        ax.plot(range(1, len(sizes) + 1), sizes, label=name, **look)
    ax.set(xlabel="layers", ylabel="receptive field, % of the map", ylim=(0, 104))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="best")
    return figure_of(ax)


@styled
def plot_cone(layers: Sequence[TokenLinks], token: Position | None = None, ax: Axes | None = None) -> Figure:
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
    set_title(ax, f"{int(reached[0].sum())} of {size} tokens reach the last layer's token")
    return figure_of(ax)
