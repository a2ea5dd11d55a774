"""Tunes the tiles of the `tiled` backend on this CPU: the most promising ones of its model are checked and timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from math import sqrt
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch

from dinat_triton import tiled
from dinat_triton.bench.harness import geometric_mean
from dinat_triton.progress import ProgressBar
from dinat_triton.tuner.layer_run import LayerRun
from dinat_triton.tuner.search import Budget, Race, Rejection, Work, race

Tile = tuple[int, ...]
# Tiles that are timed, and bursts of each.
MOST, ROUNDS = 6, 5
CONSTANTS = ("SCORE_NS", "TOKEN_NS", "ENTRY_NS", "CLASS_NS")


@contextmanager
def in_use(tile: Tile) -> Iterator[None]:
    """The backend takes this tile, whatever its table and its model say."""
    with mock.patch.object(tiled, "choose_tile", return_value=tile):
        yield


class Clock:
    """Runs a layer in one tile after the other. A wrong result rejects a tile."""

    def __init__(self, run: LayerRun):
        self.run = run
        self.found_wrong: dict[Tile, str | None] = {}
        self.forward: dict[Tile, list[float]] = {}
        self.step: dict[Tile, list[float]] = {}

    def score(self, tile: Tile) -> float | Rejection:
        """One number for inference and training: the geometric mean of a forward and of a forward and backward."""
        with in_use(tile):
            if tile not in self.found_wrong:
                self.found_wrong[tile] = self.run.check()
            if wrong := self.found_wrong[tile]:
                return Rejection(wrong)
            forward = self.run.seconds(backward=False)
            step = forward + self.run.seconds(backward=True)
        self.forward.setdefault(tile, []).append(forward)
        self.step.setdefault(tile, []).append(step)
        return sqrt(forward * step)


@dataclass(frozen=True)
class Row:
    """What tuning did for a layer: seconds of a forward, and of a forward and backward, before and after."""

    work: Work
    before: tuple[float, float]
    after: tuple[float, float]
    tile: Tile
    changed: bool


@dataclass(frozen=True)
class Sample:
    """A tile that was timed: its work in the units of the model, and its forward in nanoseconds."""

    work: Work
    tile: Tile
    units: tuple[int, ...]
    ns: float


@dataclass
class Found:
    """What was found: entries for the table, what changes, what was wrong, which layers were not reached."""

    entries: dict[str, list[int] | None] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unreached: list[Work] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


def tune_tiles(
    works: Sequence[Work],
    dtype: torch.dtype,
    budget: Budget,
    *,
    clock_of: Callable[[Work], Clock] | None = None,
    bar: Callable[[int], ProgressBar] | None = ProgressBar,
) -> Found:
    """Finds the tiles of some layers on this CPU, with as many threads as torch has now."""

    def make_clock(work: Work) -> Clock:
        return Clock(LayerRun(work.layer, work.batch, dtype, torch.device("cpu"), "tiled"))

    found = Found()
    progress = bar(len(works)) if bar else None
    for number, work in enumerate(works):
        if budget.is_spent:
            found.unreached.append(work)
            continue
        _tune(work, dtype, (clock_of or make_clock)(work), budget.share(1 / (len(works) - number)), found)
        if progress:
            progress.step(work.label)
    if progress:
        progress.close()
    return found


def _tune(work: Work, dtype: torch.dtype, clock: Clock, budget: Budget, found: Found) -> None:
    geometry, sizes = work.layer.geometry, (work.batch, work.layer.heads)
    now = tiled.choose_tile(geometry, *sizes, dtype)
    ranked = tiled.modelled_tiles(geometry, *sizes)
    finished: Race[Tile] = race(list(dict.fromkeys([now, *ranked[:MOST]])), clock.score, budget, ROUNDS)
    found.wrong += [f"{work.label} {tile}: {why}" for tile, why in finished.rejected.items()]
    # Its own model's choice needs no entry.
    modelled = ranked[0]
    tile = finished.winner(modelled)
    key = f"{tiled.tile_key(geometry, dtype, torch.get_num_threads())}/{work.maps}"
    if finished.seconds.get(tile):
        found.entries[key] = list(tile) if tile != modelled else None
    if finished.seconds.get(now) and finished.seconds.get(tile):
        before, after = ((median(clock.forward[x]), median(clock.step[x])) for x in (now, tile))
        found.rows.append(Row(work, before, after, tile, tile != now))
    for each in finished.ranked:
        units = tiled.tile_work(geometry, *sizes, each)
        found.samples.append(Sample(work, each, units, 1e9 * median(clock.forward[each])))


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
    """Of each layer: how many times the best timed forward the model's own choice takes."""
    found = []
    for work in dict.fromkeys(sample.work for sample in samples):
        times = {sample.tile: sample.ns for sample in samples if sample.work == work}
        modelled = tiled.modelled_tiles(work.layer.geometry, work.batch, work.layer.heads)[0]
        if modelled in times:
            found.append(times[modelled] / min(times.values()))
    return found


def report_on_model(samples: Sequence[Sample]) -> str:
    """What the model's constants are, what they would be here, and what its choices lose."""
    if len(samples) < 2 * len(CONSTANTS):
        return f"The model's constants were not fitted: {len(samples)} timed tiles are too few."
    fitted: Mapping[str, Any] = fit(samples)
    lost = losses(samples)
    constants = ", ".join(f"{name} {getattr(tiled, name):g} (here {fitted[name]:.3g})" for name in CONSTANTS)
    return (
        f"The model's constants: {constants}.\n"
        f"Its choices take {geometric_mean(lost):.2f}x the best forward timed, {max(lost):.2f}x at worst."
    )
