"""Where layers lie against what a device allows: their work by the plan a backend takes, their times out of files.

The work of a layer is counted twice. *Useful* is what the definition asks for: the scores that attend, and every tensor
moved once. *Evaluated* is what the plan makes of it: whole tiles of scores, padding included, and every tensor moved
once by each sweep over it. What overlapping tiles load again comes out of a cache and is not counted.

A layer's bound is the time of its largest limit: bytes over the ceiling of copies, operations over that of products,
exponentials over theirs, all as evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from math import floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dinat_triton.bench import ceilings as ceiling
from dinat_triton.bench import harness
from dinat_triton.bench.harness import BACKWARD, FORWARD, FORWARD_BACKWARD, Record, Timing
from dinat_triton.bench.selection import short_name
from dinat_triton.layers import Layer
from dinat_triton.plan import Cost, Plan
from dinat_triton.tiled import choose_tile

if TYPE_CHECKING:
    from dinat_triton.offline.targets import Target

LIMITS = ("memory", "products", "exps")
OURS = ("tiled", "triton", "triton graph")
BOUND = "bound"
NOT_MEASURED = "not measured: its bound alone is drawn"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Products per score, and tensors of the query's size that are moved, which no implementation can do without.
NEEDED = {FORWARD: (2, 4), BACKWARD: (5, 7), FORWARD_BACKWARD: (7, 11)}


@dataclass(frozen=True)
class Sweep:
    """One run of a backend over a plan.

    Attributes:
        tensors: Of the query's size, read or written.
        numbers: Float32 numbers per query, read or written.
        products: Matrix products per score.
    """

    cost: Cost
    tensors: int
    numbers: int
    products: int


@dataclass(frozen=True)
class Work:
    """Of one layer in one pass. Scores are per query; those evaluated are of the pass's first sweep."""

    useful_scores: float
    scores: float
    useful_flops: float
    useful_bytes: float
    flops: float
    bytes: float
    exps: float

    @classmethod
    def of(cls, layer: Layer, batch: int, pass_: str, itemsize: int, sweeps: Sequence[Sweep]) -> Work:
        products, tensors = NEEDED[pass_]
        maps, first = batch * layer.heads, sweeps[0].cost
        flops, token = 2 * maps * layer.dim, maps * layer.dim * itemsize
        return cls(
            useful_scores=first.useful_per_query,
            scores=first.scores_per_query,
            useful_flops=products * first.useful_scores * flops,
            useful_bytes=tensors * first.queries * token,
            flops=sum(sweep.products * sweep.cost.scores for sweep in sweeps) * flops,
            bytes=sum((sweep.tensors * token + 4 * sweep.numbers * maps) * sweep.cost.queries for sweep in sweeps),
            exps=sum(sweep.cost.scores for sweep in sweeps) * maps,
        )

    def limits(self, ceilings: Mapping[str, Any], dtype: str) -> dict[str, float]:
        """Seconds that each limit alone takes."""
        rates = (ceilings["copy_bytes_per_s"], product_rate(ceilings, dtype), ceilings["exps_per_s"])
        return {
            name: n / rate for name, n, rate in zip(LIMITS, (self.bytes, self.flops, self.exps), rates, strict=True)
        }


@dataclass(frozen=True)
class Point:
    """One layer in one pass, and who took how long for it."""

    model: str
    layer: Layer
    batch: int
    pass_: str
    dtype: str
    work: Work
    timings: dict[str, Timing] = field(default_factory=dict)

    @property
    def group(self) -> str:
        return group_of(self.model, self.layer)

    @property
    def title(self) -> str:
        return short_name(self.layer).replace("-", " ")

    @property
    def problem(self) -> dict[str, Any]:
        """As result files describe it."""
        problem = asdict(self.layer)
        weight = problem.pop("count")
        return {"model": self.model} | problem | {"batch": self.batch, "weight": weight}

    @property
    def ours(self) -> str | None:
        """The name under which our own time stands."""
        return next((name for name in OURS if name in self.timings), None)

    def seconds(self, implementation: str) -> float:
        return self.timings[implementation].median / 1e3

    def bound(self, ceilings: Mapping[str, Any]) -> tuple[str, float]:
        """The limit that binds, and its seconds."""
        limits = self.work.limits(ceilings, self.dtype)
        name = max(limits, key=lambda limit: limits[limit])
        return name, limits[name]

    def records(self) -> Iterator[Record]:
        """As lines of a result file: one for each time, or one that says there is none."""
        work = asdict(self.work)
        for name, timing in self.timings.items():
            yield Record(self.problem, name, self.pass_, self.dtype, timing=timing, work=work)
        if not self.timings:
            yield Record(self.problem, BOUND, self.pass_, self.dtype, reason=NOT_MEASURED, work=work)


def group_of(model: str, layer: Layer) -> str:
    """The model and its setting, such as `dinat_mini@224`."""
    return f"{model}@{layer.name.partition('/')[0]}"


def pass_of(gpu: bool, backward: bool) -> str:
    """The pass as benches time it: on a CPU a backward comes with its forward."""
    if not backward:
        return FORWARD
    return BACKWARD if gpu else FORWARD_BACKWARD


def product_rate(ceilings: Mapping[str, Any], dtype: str) -> float:
    return ceilings["product_flops_per_s"]["float32" if dtype == "float32" else "bfloat16"]


# Work


def cpu_sweeps(layer: Layer, batch: int, pass_: str, dtype: torch.dtype = torch.float32) -> list[Sweep]:
    """What `tiled` runs. Its backward computes the softmax anew, so it reads neither the output nor its sums."""
    cost = Plan(layer.geometry, choose_tile(layer.geometry, batch, layer.heads, dtype)).cost()
    sweeps = {FORWARD: Sweep(cost, 4, 0, 2), BACKWARD: Sweep(cost, 7, 0, 5)}
    return [sweeps[each] for each in pass_.split("+")]


def gpu_sweeps(layer: Layer, batch: int, pass_: str, dtype: torch.dtype, device: torch.device) -> list[Sweep]:
    """What the kernels run: one launch each."""
    from dinat_triton.kernels.schedule import has_closed_backward, problem_of, schedule_of
    from dinat_triton.offline.estimate import TRAFFIC

    sizes = (batch, layer.heads, layer.heads, layer.dim, layer.dim)
    problem = problem_of(layer.geometry, *sizes, dtype, device)
    if pass_ == FORWARD:
        names = ["forward"]
    elif has_closed_backward(problem):
        names = ["closed_backward"]
    else:
        one_chunk = schedule_of(problem, "query_backward").one_chunk
        queries = ["query_backward"] if one_chunk else ["query_backward chunks", "query_backward bias"]
        names = [*queries, "key_backward"]
    sweeps = []
    for name in names:
        traffic, schedule = TRAFFIC[name], schedule_of(problem, name.split()[0])
        tensors = traffic.rows + traffic.columns
        sweeps.append(Sweep(schedule.layout.plan.cost(), tensors, traffic.numbers, traffic.products))
    return sweeps


def points_of(
    layers: Sequence[tuple[str, Layer]],
    pass_: str,
    dtype: str,
    batch: int | None,
    device: torch.device,
    target: Target | None = None,
) -> list[Point]:
    """Layers with their work.

    Args:
        layers: As `find_layers` gives them.
        pass_: Forward, backward (of the kernels), or both together (of `tiled`).
        dtype: Of the tensors.
        batch: Images; by default one on a CPU, 128 on a GPU, of which detection takes an eighth.
        device: Whose backend is asked for its plans.
        target: Instead of the device, a GPU that need not be there.
    """
    points = []
    with as_if_on(target):
        for model, layer in layers:
            images = batch or default_batch(group_of(model, layer), device)
            if device.type == "cpu":
                sweeps = cpu_sweeps(layer, images, pass_, DTYPES[dtype])
            else:
                where = torch.device("meta") if target else device
                sweeps = gpu_sweeps(layer, images, pass_, DTYPES[dtype], where)
            work = Work.of(layer, images, pass_, DTYPES[dtype].itemsize, sweeps)
            points.append(Point(model, layer, images, pass_, dtype, work))
    return points


def as_if_on(target: Target | None):
    """Lets the backend plan for a GPU that is not there."""
    if target is None:
        return nullcontext()
    from dinat_triton.offline.inspect import recording

    return recording(target)


def default_batch(name: str, device: torch.device) -> int:
    """Of a model at a setting."""
    if device.type == "cpu":
        return 1
    return 16 if name.endswith("@coco") else 128


# Results


@dataclass(frozen=True)
class Results:
    """Result files of one device, taken together. Ceilings are those of the last file that holds any."""

    names: list[str]
    environment: dict[str, Any]
    records: list[Record]
    ceilings: dict[str, Any] | None

    @property
    def device(self) -> str:
        return self.environment["device"]

    @property
    def device_type(self) -> str:
        return self.environment["device_type"]

    @property
    def is_of_here(self) -> bool:
        """Whether they are of this machine as it runs now."""
        if self.device_type == "cuda" and not torch.cuda.is_available():
            return False
        same_threads = self.device_type == "cuda" or self.environment["threads"] == torch.get_num_threads()
        return same_threads and harness.device_name(torch.device(self.device_type)) == self.device

    @classmethod
    def load(cls, paths: Sequence[Path]) -> Results:
        records = [record for path in paths for record in harness.load_records(path)]
        environments = [harness.load(path)["environment"] for path in paths]
        devices = sorted({environment["device"] for environment in environments})
        if len(devices) > 1:
            raise ValueError(f"the results are of {' and of '.join(devices)}: draw one device at a time")
        known = [found for path in paths if (found := ceiling.ceilings_in(path))]
        return cls([path.name for path in paths], environments[0], records, known[-1] if known else None)


def add_timings(points: Sequence[Point], results: Results) -> None:
    """Fills in the times of the points' layers, and refuses results that have none of any."""
    timings: dict[tuple[str, str, str], dict[str, Timing]] = {}
    for record in results.records:
        if record.timing is not None:
            timings.setdefault(_cell(record), {})[record.implementation] = record.timing
    for point in points:
        point.timings.update(timings.get(_cell(next(point.records())), {}))
    if not any(point.timings for point in points):
        wanted = f"{points[0].group}, batch {points[0].batch}, {points[0].dtype}, {points[0].pass_}"
        held = sorted({f"batch {r.problem.get('batch')}, {r.dtype}, {r.pass_}" for r in results.records if r.timing})
        raise ValueError(f"{', '.join(results.names)} must have times of {wanted}, got {'; '.join(held) or 'none'}")


def _cell(record: Record) -> tuple[str, str, str]:
    """What makes two records the same problem, whatever model it is from."""
    same = {name: of for name, of in record.problem.items() if name not in ("model", "name", "weight")}
    return replace(record, problem=same).cell


def points_in(records: Sequence[Record]) -> list[Point]:
    """The points of a file that `dinat-triton roofline --json` wrote."""
    points: dict[str, Point] = {}
    for record in records:
        problem: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.problem.items()}
        model, batch = problem.pop("model"), problem.pop("batch")
        layer = Layer(count=problem.pop("weight"), **problem)
        point = Point(model, layer, batch, record.pass_, record.dtype, Work(**record.work))
        point = points.setdefault(f"{model} {layer}", point)
        if record.timing is not None:
            point.timings[record.implementation] = record.timing
    return list(points.values())


# Text


def report(points: Sequence[Point], ceilings: Mapping[str, Any]) -> str:
    """The ceilings, and per layer work, the time of each limit, and how far ours and the others are from the bound."""
    products = ", ".join(f"{short(rate)}FLOP/s in {name}" for name, rate in ceilings["product_flops_per_s"].items())
    lines = [
        f"Ceilings of {ceilings['device']}, {ceilings['source']}: copies {short(ceilings['copy_bytes_per_s'])}B/s, "
        f"products {products}, {short(ceilings['exps_per_s'])}exponentials/s",
        f"{points[0].pass_}, {points[0].dtype}: scores per query, evaluated and useful; bytes and times of the batch\n",
        table(points, ceilings),
    ]
    if any(point.ours and point.seconds(point.ours) < point.bound(ceilings)[1] for point in points):
        lines.append("\nA layer is faster than its bound: these ceilings are too low. Was the machine busy?")
    return "\n".join(lines)


def short(rate: float) -> str:
    """Three digits and a prefix, such as `4.3 T`."""
    power = max(0, min(5, floor(log10(rate) / 3)))
    return f"{rate / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}"


def table(points: Sequence[Point], ceilings: Mapping[str, Any]) -> str:
    peers = [name for name in implementations(points) if name not in ("tiled", "triton")]
    timed = any(point.ours for point in points)
    head = ["layer", "scores", "useful", "MB", *(f"{name} us" for name in LIMITS), "binds"]
    head += ["us", "of bound", *(f"x {name}" for name in peers)] if timed else []
    return harness.table(head, [_row(point, ceilings, peers, timed) for point in points])


def _row(point: Point, ceilings: Mapping[str, Any], peers: Sequence[str], timed: bool) -> list[str]:
    work, (binds, bound) = point.work, point.bound(ceilings)
    limits = work.limits(ceilings, point.dtype).values()
    row = [f"{point.group} {point.title} b{point.batch}", f"{work.scores:.0f}", f"{work.useful_scores:.0f}"]
    row += [f"{work.bytes / 1e6:.1f}", *(f"{1e6 * seconds:.1f}" for seconds in limits), binds]
    if not timed:
        return row
    if point.ours is None:
        return [*row, "-", "-", *("-" for _ in peers)]
    ours = point.seconds(point.ours)
    ratios = [f"{point.seconds(name) / ours:.1f}" if name in point.timings else "-" for name in peers]
    return [*row, f"{1e6 * ours:.1f}", f"{bound / ours:.0%}", *ratios]


def implementations(points: Sequence[Point]) -> list[str]:
    """Everyone who has a time: ours first, then in the files' order."""
    found = dict.fromkeys(name for point in points for name in point.timings)
    return sorted(found, key=lambda name: OURS.index(name) if name in OURS else len(OURS))
