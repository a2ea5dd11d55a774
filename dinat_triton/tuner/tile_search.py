"""Tunes the tiles of the `tiled` backend on this CPU: the most promising ones of its model are checked and timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import exp, log, sqrt
from statistics import fmean, median

import numpy as np
import torch

from dinat_triton import tiled
from dinat_triton.layers import Layer
from dinat_triton.tuner.layer_run import LayerRun
from dinat_triton.tuner.search import ROUNDS, Budget, Found, Rejection, Row, layer_by_layer, race

Tile = tuple[int, ...]
# Seconds of a forward or a backward of one layer in a tile, or why it must not be taken.
Clock = Callable[[Tile, bool], float | Rejection]
# Tiles that are timed.
MOST = 6
CONSTANTS = ("SCORE_NS", "TOKEN_NS", "ENTRY_NS", "CLASS_NS")


@dataclass(frozen=True)
class Sample:
    """A tile that was timed: its work in the units of the model, and its forward in nanoseconds."""

    layer: Layer
    tile: Tile
    units: tuple[int, ...]
    ns: float


def tune_tiles(
    layers: Sequence[Layer],
    dtype: torch.dtype,
    budget: Budget,
    clock_of: Callable[[Layer], Clock] | None = None,
) -> tuple[Found, list[Sample]]:
    """Finds the tiles of some layers on this CPU, with as many threads as torch has now.

    Args:
        layers: The layers.
        dtype: Dtype of all tensors.
        budget: Time for all of it.
        clock_of: Times a layer; by default it is run.
    """

    def run(layer: Layer) -> Clock:
        return LayerRun(layer, dtype, torch.device("cpu"), tiled, lambda tile: {"tile": tile}).score

    found, samples = Found(), []
    for layer, share in layer_by_layer(layers, budget, found):
        samples += _tune(layer, dtype, (clock_of or run)(layer), share, found)
    return found, samples


def _tune(layer: Layer, dtype: torch.dtype, clock: Clock, budget: Budget, found: Found) -> list[Sample]:
    sizes = (layer.geometry, layer.batch, layer.heads)
    times: dict[Tile, tuple[list[float], list[float]]] = {}

    def score(tile: Tile) -> float | Rejection:
        """One number for inference and training: the geometric mean of a forward and of a forward and backward."""
        forward = clock(tile, False)
        if isinstance(forward, Rejection):
            return forward
        backward = clock(tile, True)
        if isinstance(backward, Rejection):
            return backward
        step = forward + backward
        for of_tile, seconds in zip(times.setdefault(tile, ([], [])), (forward, step), strict=True):
            of_tile.append(seconds)
        return sqrt(forward * step)

    now, ranked = tiled.choose_tile(*sizes, dtype), tiled.modelled_tiles(*sizes)
    finished = race(dict.fromkeys([now, *ranked[:MOST]]), score, budget, ROUNDS)
    found.wrong += [f"{layer} {tile}: {why}" for tile, why in finished.rejected.items()]
    # Its own model's choice needs no entry.
    modelled = ranked[0]
    best = finished.winner(modelled)
    if finished.seconds.get(best):
        key = f"{tiled.tile_key(layer.geometry, dtype, torch.get_num_threads())}/{layer.maps}"
        found.entries[key] = list(best) if best != modelled else None
    if finished.seconds.get(now) and finished.seconds.get(best):
        for name, before, after in zip(("forward", "forward+backward"), times[now], times[best], strict=True):
            found.rows.append(Row(layer, name, median(before), median(after), best, best != now))
    return [Sample(layer, x, tiled.tile_work(*sizes, x), 1e9 * median(times[x][0])) for x in finished.ranked]


# How well the model fits this machine


def fit(samples: Sequence[Sample]) -> dict[str, float]:
    """The model's constants as this machine would have them: the least relative errors, none of them negative."""
    units = np.array([sample.units for sample in samples], dtype=float)
    units /= np.array([[sample.ns] for sample in samples])
    best, least = np.zeros(len(CONSTANTS)), np.inf
    for size in range(1, len(CONSTANTS) + 1):
        for columns in map(list, combinations(range(len(CONSTANTS)), size)):
            solution = np.linalg.lstsq(units[:, columns], np.ones(len(samples)), rcond=None)[0]
            error = np.sum((units[:, columns] @ solution - 1) ** 2)
            if (solution >= 0).all() and error < least:
                best, least = np.zeros(len(CONSTANTS)), error
                best[columns] = solution
    return dict(zip(CONSTANTS, map(float, best), strict=True))


def losses(samples: Sequence[Sample]) -> list[float]:
    """Time of the model's own choice over that of the best one, for each layer."""
    found = []
    for layer in dict.fromkeys(sample.layer for sample in samples):
        times = {sample.tile: sample.ns for sample in samples if sample.layer == layer}
        modelled = tiled.modelled_tiles(layer.geometry, layer.batch, layer.heads)[0]
        if modelled in times:
            found.append(times[modelled] / min(times.values()))
    return found


def report_on_model(samples: Sequence[Sample]) -> str:
    """The model's constants, what they would be here, and what its choices lose."""
    if len(samples) < 2 * len(CONSTANTS):
        return f"The model's constants were not fitted: {len(samples)} timed tiles are too few."
    fitted, lost = fit(samples), losses(samples)
    constants = ", ".join(f"{name} {getattr(tiled, name):g} (here {fitted[name]:.3g})" for name in CONSTANTS)
    return (
        f"The model's constants: {constants}.\n"
        f"Its choices take {exp(fmean(map(log, lost))):.2f}x the best forward timed, {max(lost):.2f}x at worst."
    )
