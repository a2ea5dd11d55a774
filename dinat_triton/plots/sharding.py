"""Figures of sharded maps."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from dinat_triton.distributed.shares import CLASSES, HALO, chunks, shares
from dinat_triton.geometry import Geometry, IntArray
from dinat_triton.plots.drawing import KEY, OTHER, QUERY, SEEN, SELF, draw_states, set_title, styled


@styled
def plot_shares(geometry: Geometry, ranks: int, *, axis: int = 0) -> Figure:
    """Draws what each rank computes along a sharded axis, and the keys that it fetches for that, by either scheme.

    Args:
        geometry: The whole map and its windows.
        ranks: Ranks that the axis is cut over.
        axis: Of the map.
    """
    if not 0 <= axis < geometry.rank:
        raise ValueError(f"axis must be one of the map's {geometry.rank}, got {axis}")
    size = geometry.shape[axis]
    figure = Figure(figsize=(min(0.14 * size, 7.5), 0.2 * ranks + 1.3), layout="constrained")
    for scheme, ax in zip((HALO, CLASSES), figure.subplots(2), strict=True):
        cells, fetched = share_cells(geometry, ranks, axis, scheme)
        draw_states(ax, cells, KEY, QUERY)
        ax.set_yticks(np.arange(ranks) + 0.5, [f"rank {rank}" for rank in range(ranks)])
        ax.tick_params(length=0)
        what = "keys" if scheme == HALO else "queries with their keys"
        set_title(ax, f"{scheme}: a rank fetches at most {int(fetched.max())} {what}")
    return figure


def share_cells(geometry: Geometry, ranks: int, axis: int, scheme: str) -> tuple[IntArray, IntArray]:
    """`[ranks, size]`: SELF where a rank computes, SEEN where it only reads; and how many positions each fetches."""
    cells = np.full((ranks, geometry.shape[axis]), OTHER)
    parts = shares(geometry.axes[axis], ranks, scheme)
    for row, part in zip(cells, parts, strict=True):
        row[part.needed], row[part.owned] = SEEN, SELF
    owned = chunks(geometry.shape[axis], ranks)
    return cells, np.array([len(np.setdiff1d(part.needed, own)) for part, own in zip(parts, owned, strict=True)])
