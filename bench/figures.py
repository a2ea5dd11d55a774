"""The bench's figures, drawn from result files. Ours is always the blue circle.

Colours are told apart by every kind of colour vision, and each comes with a shape or a shade of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from dinat_triton.bench import profiling
from dinat_triton.bench.harness import Results
from dinat_triton.bench.roofline import OURS, Point, implementations, points_in
from dinat_triton.commands.tables import short
from dinat_triton.plots import INK, KEY, PAPER, QUERY, styled
from dinat_triton.work import LIMITS, Ceilings

GREEN, PINK, VERMILION, SKY, YELLOW = "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442"
GREYS = ("#9a9a9a", "#bdbdbd", "#dedede")
OUR_LOOK: dict[str, Any] = {"color": KEY, "marker": "o"}
PEER_LOOKS: tuple[dict[str, Any], ...] = tuple(
    {"color": color, "marker": marker}
    for color, marker in zip((QUERY, GREEN, VERMILION, PINK, SKY, INK, YELLOW), "s^DvPX<", strict=True)
)
PART_LOOKS: dict[str, dict[str, Any]] = {
    profiling.ATTENTION: {"color": KEY},
    profiling.LINEAR: {"color": QUERY},
    profiling.CONVOLUTION: {"color": GREEN},
    profiling.NORM: {"color": SKY},
    profiling.ACTIVATION: {"color": PINK},
    profiling.OTHER: {"color": GREYS[1]},
    profiling.OPTIMIZER: {"color": VERMILION},
    profiling.OVERHEAD: {"color": "#efefef", "hatch": "///", "linewidth": 0},
}
DARK = (profiling.ATTENTION, profiling.CONVOLUTION, profiling.OPTIMIZER)
NOTE: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "color": INK}


def draw(results: Results) -> Figure:
    """The figure of a result file, of `roofline` or `bench profile`."""
    if results.bench == "profile":
        return plot_profiles(results)
    if results.bench != "roofline" or results.ceilings is None:
        raise ValueError(f"only results of roofline and profile are drawn, and these are of {results.bench}")
    return plot_roofline(points_in(results), results.ceilings)


# Rooflines


@styled
def plot_roofline(points: Sequence[Point], ceilings: Ceilings) -> Figure:
    """Per model two panels: its layers under the ceilings, and everyone's times beside those of each limit.

    To the left, a hollow mark is the useful work of a layer and the full one what its plan evaluates, both done in the
    same time: measured, or where nothing was measured that of its bound. A number is a layer's, as to the right, where
    no mark can lie within the bars.
    """
    groups = [list(of) for _, of in groupby(points, lambda point: point.layer.group)]
    heights = [max(2.3, 0.33 * len(group) + 0.5) for group in groups]
    figure = Figure(figsize=(8.8, sum(heights) + 1), layout="constrained")
    grid = figure.subplots(len(groups), 2, squeeze=False, height_ratios=heights, width_ratios=(1.15, 1))
    looks = looks_of(implementations(points))
    for (roof, times), group in zip(grid, groups, strict=True):
        _draw_roof(roof, group, ceilings)
        _draw_times(times, group, ceilings, looks)
    first = points[0]
    figure.suptitle(f"{first.pass_}, {first.dtype}, on {ceilings.device}; ceilings: {ceilings.source}", fontsize=9)
    _legend(figure, 6)
    return figure


def looks_of(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a shape for everyone: ours first."""
    peers = [name for name in names if name not in OURS]
    ours = {name: OUR_LOOK | ({"marker": "*"} if name.endswith("graph") else {}) for name in names if name in OURS}
    return ours | dict(zip(peers, cycle(PEER_LOOKS), strict=False))


def _draw_roof(ax: Axes, points: Sequence[Point], ceilings: Ceilings) -> None:
    places = [marks(point, ceilings) for point in points]
    intensities, rates = zip(*(mark for pair in places for mark in pair), strict=True)
    ax.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="FLOP per second")
    _draw_ceilings(ax, points, ceilings, (min(intensities) / 3, max(intensities) * 3), min(rates) / 2)
    for number, (useful, evaluated) in enumerate(places, 1):
        here = [n for n, (_, other) in enumerate(places, 1) if np.allclose(other, evaluated, rtol=0.03, atol=0)]
        ax.annotate(" ".join(map(str, here)) if here[0] == number else "", evaluated, (5, -2), **NOTE)
        ax.plot(*zip(useful, evaluated, strict=True), color=KEY, linewidth=1, zorder=3)
        ax.plot(*useful, "o", color=KEY, markerfacecolor=PAPER, zorder=4, label="useful work of a layer")
        ax.plot(*evaluated, "o", color=KEY, zorder=4, label="work its plan evaluates")
    with_units(ax.xaxis, ax.yaxis)
    timed = sum(point.ours is not None for point in points)
    state = "" if timed == len(points) else f", {'partly ' * bool(timed)}not measured: at the bounds"
    ax.set_title(f"{points[0].layer.group}, batch {points[0].layer.batch}{state}", loc="left")


def marks(point: Point, ceilings: Ceilings) -> tuple[tuple[float, float], tuple[float, float]]:
    """Useful and evaluated: operations per byte, and per second of our time or else of the bound."""
    seconds = point.seconds(point.ours) if point.ours else point.bound(ceilings)[1]
    work = point.work
    useful = work.useful_flops / work.useful_bytes, work.useful_flops / seconds
    return useful, (work.flops / work.bytes, work.flops / seconds)


def _draw_ceilings(
    ax: Axes, points: Sequence[Point], ceilings: Ceilings, x: tuple[float, float], bottom: float
) -> None:
    """The slope of memory up to the ceiling of products, and that of exponentials."""
    copy, products = ceilings.copy_bytes_per_s, ceilings.products(points[0].dtype)
    ridge = products / copy
    left, right = min(x[0], ridge / 6), max(x[1], 8 * ridge)
    ax.set(xlim=(left, right), ylim=(bottom, 2.5 * products))
    ax.plot([left, ridge, right], [left * copy, products, products], color=INK, linewidth=1.2, zorder=1)
    ax.annotate(f"products: {short(products)}FLOP/s", (right, products), (0, 2), ha="right", va="bottom", **NOTE)
    ax.annotate(f"copies: {short(copy)}B/s", (ridge, products), (-8, 2), ha="right", va="bottom", **NOTE)
    exps = min(point.work.flops / point.work.exps for point in points) * ceilings.exps_per_s
    if exps < products:
        ax.plot([exps / copy, right], [exps, exps], color=INK, linewidth=1, linestyle="--", zorder=1)
        label = f"exponentials: {short(ceilings.exps_per_s)}/s"
        ax.annotate(label, (right, exps), (0, 2), ha="right", va="bottom", **NOTE)


def _draw_times(ax: Axes, points: Sequence[Point], ceilings: Ceilings, looks: Mapping[str, Any]) -> None:
    rows = range(len(points))
    limits = [point.work.limits(ceilings, point.dtype) for point in points]
    least = min(min(each.values()) for each in limits) / 2
    for number, (name, grey) in enumerate(zip(LIMITS, GREYS, strict=True)):
        places = [row + 0.27 * (number - 1) for row in rows]
        widths = [each[name] - least for each in limits]
        ax.barh(places, widths, height=0.25, left=least, color=grey, label=f"limit: {name}", zorder=1)
    for name, look in looks.items():
        timed = [(point.seconds(name), row) for row, point in zip(rows, points, strict=True) if name in point.timings]
        ax.plot(*zip(*timed, strict=True), linestyle="", markersize=4.5, label=name, zorder=3, **look)
    ax.set(xscale="log", xlabel="time of a layer", xlim=(least, None), ylim=(len(points) - 0.4, -0.6))
    ax.set_yticks(rows, [f"{number}: {point.title}" for number, point in enumerate(points, 1)])
    ax.yaxis.tick_right()
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    with_units(ax.xaxis, unit="s")


# Profiles


@styled
def plot_profiles(results: Results) -> Figure:
    """A bar per model, as long as its step, cut into its parts; shares of at least 4 % are written in."""
    records = results.records
    figure = Figure(figsize=(8.8, 0.55 * len(records) + 1.3), layout="constrained")
    ax = figure.add_subplot()
    longest = max(sum(record.also["parts_ms"].values()) for record in records)
    for row, record in enumerate(records):
        left = 0.0
        for part in profiling.parts_in(records):
            ms = record.also["parts_ms"][part]
            ax.barh(row, ms, left=left, height=0.62, label=part, edgecolor=PAPER, **PART_LOOKS[part])
            if ms >= 0.04 * longest:
                look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}
                shade = PAPER if part in DARK else INK
                ax.text(left + ms / 2, row, f"{profiling.shares(record)[part]:.0%}", color=shade, **look)
            left += ms
    ax.set_yticks(range(len(records)), [record.implementation for record in records])
    ax.set(xlabel="milliseconds of a step", ylim=(len(records) - 0.5, -0.5))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    first, device = records[0], results.environment["device"]
    ax.set_title(f"{first.pass_}, batch {first.problem['batch']}, {first.dtype}, on {device}", loc="left")
    _legend(figure, 8)
    return figure


# Help


def with_units(*axes: Axis, unit: str = "") -> None:
    """Labels logarithmic axes 1 k, 1 M, 1 G, with a unit."""
    for axis in axes:
        axis.set_major_formatter(EngFormatter(unit))
        axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, columns: int) -> None:
    """Below the panels, each label once."""
    entries = [ax.get_legend_handles_labels() for ax in figure.axes]
    handles = {label: handle for pair in entries for handle, label in zip(*pair, strict=True)}
    look = {"fontsize": 8, "columnspacing": 1.2, "handlelength": 1.6}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(handles), columns), **look)
