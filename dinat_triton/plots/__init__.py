"""Figures of windows, receptive fields, plans and attention.

Every function draws on the axes it is given, or on a figure of its own, and returns the figure. Figures live outside
pyplot, so nothing has to be closed. What is drawn comes from `Geometry`, `Plan` and `receptive_field`.
"""

from dinat_triton.plots.attention import plot_attention, plot_bias
from dinat_triton.plots.drawing import CELL, INK, KEY, OTHER, PAPER, QUERY, SEEN, SELF, save, styled
from dinat_triton.plots.plans import (
    class_map,
    plot_classes,
    plot_cost,
    plot_plan,
    plot_tile,
    plot_tile_pairs,
    tile_cells,
    tile_of,
    tile_tokens,
)
from dinat_triton.plots.sharding import plot_shares, share_cells
from dinat_triton.plots.text import text_cells, text_heat
from dinat_triton.plots.windows import (
    neighborhood,
    plot_cone,
    plot_dilations,
    plot_field,
    plot_growth,
    plot_neighborhood,
    plot_neighborhoods,
    plot_pairs,
    plot_receptive_fields,
)

__all__ = [
    "CELL",
    "INK",
    "KEY",
    "OTHER",
    "PAPER",
    "QUERY",
    "SEEN",
    "SELF",
    "class_map",
    "neighborhood",
    "plot_attention",
    "plot_bias",
    "plot_classes",
    "plot_cone",
    "plot_cost",
    "plot_dilations",
    "plot_field",
    "plot_growth",
    "plot_neighborhood",
    "plot_neighborhoods",
    "plot_pairs",
    "plot_plan",
    "plot_receptive_fields",
    "plot_shares",
    "plot_tile",
    "plot_tile_pairs",
    "save",
    "share_cells",
    "styled",
    "text_cells",
    "text_heat",
    "tile_cells",
    "tile_of",
    "tile_tokens",
]
