"""Layers against what a device allows: their work by the plan a backend takes, their times out of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dinat_triton.bench.harness import Cell, Record, Results, Timing
from dinat_triton.commands.tables import short, table
from dinat_triton.layers import Layer
from dinat_triton.work import FORWARD, LIMITS, Ceilings, Work, tiled_work

if TYPE_CHECKING:
    from dinat_triton.offline.targets import Target

OURS = ("tiled", "triton", "triton graph")
BOUND = "bound"
NOT_MEASURED = "not measured: its bound alone is drawn"


@dataclass(frozen=True)
class Point:
    """One layer in one pass, and who took how long for it."""

    layer: Layer
    pass_: str
    dtype: str
    work: Work
    timings: dict[str, Timing] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.layer.short_name.replace("-", " ")

    @property
    def ours(self) -> str | None:
        """The name under which our own time stands."""
        return next((name for name in OURS if name in self.timings), None)

    def seconds(self, implementation: str) -> float:
        return self.timings[implementation].median / 1e3

    def bound(self, ceilings: Ceilings) -> tuple[str, float]:
        """The limit that takes longest, and its seconds."""
        limits = self.work.limits(ceilings, self.dtype)
        name = max(limits, key=lambda limit: limits[limit])
        return name, limits[name]


def work_of(cell: Cell, where: torch.device | Target) -> Work:
    """The work that our backend makes of a layer on a device that is here, or on a GPU that need not be."""
    layer, pass_, dtype = cell.layer, cell.pass_, getattr(torch, cell.dtype)
    if isinstance(where, torch.device) and where.type == "cpu":
        return tiled_work(layer, pass_, dtype)
    from dinat_triton.kernels.configs import architecture_of
    from dinat_triton.offline.estimate import record
    from dinat_triton.offline.targets import target_of

    target = target_of(architecture_of(where)) if isinstance(where, torch.device) else where
    _, steps = record(layer, target, dtype)
    return Work.of(pass_, [step.sweep for step in steps if step.backward == (pass_ != FORWARD)])


def bound(cell: Cell, where: torch.device | Target) -> Record:
    """A record without a time, that keeps the work."""
    return cell.record(BOUND, reason=NOT_MEASURED, also={"work": asdict(work_of(cell, where))})


def points_in(results: Results) -> list[Point]:
    """The layers of a result file whose work it holds, with everyone's times."""
    points: dict[tuple[str, str, str], Point] = {}
    for record in results.records:
        if "work" in record.also and record.cell not in points:
            problem: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.problem.items()}
            work = Work(**record.also["work"])
            points[record.cell] = Point(Layer(**problem), record.pass_, record.dtype, work)
    for record in results.records:
        if record.timing and record.cell in points:
            points[record.cell].timings[record.implementation] = record.timing
    return list(points.values())


def load(path: Path) -> Results:
    """A result file that can be drawn."""
    results = Results.load(path)
    if results.ceilings is None or not points_in(results):
        raise ValueError(f"{path} must hold layers and ceilings, as `dinat-triton bench layers` writes them")
    return results


# The report


def report(results: Results) -> str:
    """The ceilings, and per layer work, the time of each limit, and how far ours is from the bound."""
    points, ceilings = points_in(results), results.ceilings
    assert ceilings is not None
    products = ", ".join(f"{short(rate)}FLOP/s in {name}" for name, rate in ceilings.product_flops_per_s.items())
    head = ["layer", "scores", "useful", "MB", *(f"{name} us" for name in LIMITS), "binds"]
    head += ["us", "of bound"] if any(point.ours for point in points) else []
    rows = [_row(point, ceilings)[: len(head)] for point in points]
    lines = [
        f"Ceilings of {ceilings.device}, {ceilings.source}: copies {short(ceilings.copy_bytes_per_s)}B/s, "
        f"products {products}, {short(ceilings.exps_per_s)}exponentials/s",
        "Scores per query, evaluated and useful; bytes and times of the batch\n",
        table(head, rows),
    ]
    if any(point.ours and point.seconds(point.ours) < point.bound(ceilings)[1] for point in points):
        lines.append("\nA layer is faster than its bound: these ceilings are too low. Was the machine busy?")
    return "\n".join(lines)


def _row(point: Point, ceilings: Ceilings) -> list[str]:
    work, (binds, bound) = point.work, point.bound(ceilings)
    limits = work.limits(ceilings, point.dtype).values()
    row = [f"{point.layer} {point.dtype} {point.pass_}", f"{work.scores:.0f}", f"{work.useful_scores:.0f}"]
    row += [f"{work.bytes / 1e6:.1f}", *(f"{1e6 * seconds:.1f}" for seconds in limits), binds]
    if point.ours is None:
        return [*row, "-", "-"]
    ours = point.seconds(point.ours)
    return [*row, f"{1e6 * ours:.1f}", f"{bound / ours:.0%}"]


def implementations(points: Sequence[Point]) -> list[str]:
    """Everyone who has a time: ours first, then in the files' order."""
    found: Mapping[str, None] = dict.fromkeys(name for point in points for name in point.timings)
    return sorted(found, key=lambda name: OURS.index(name) if name in OURS else len(OURS))
