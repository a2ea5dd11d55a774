"""How cost grows with the image, the kernel, the dilation and the batch: `dinat-triton bench scaling`.

On paper: plans count their scores without a single tensor, so maps of a million tokens take no longer than small ones.
What varies varies around a layer of DiNAT-Mini's first level at 224 x 224: 56 x 56 tokens, two heads of 32 channels,
kernel 7, one image. *Local* layers have dilation 1, *dilated* ones the largest that fits their map.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dinat_triton.bench import harness
from dinat_triton.bench.harness import FORWARD, Record
from dinat_triton.bench.outputs import check_outputs
from dinat_triton.bench.roofline import DTYPES, LIMITS, Sweep, Work, cpu_sweeps
from dinat_triton.bench.selection import check_names
from dinat_triton.layers import HEAD_DIM, KERNEL_SIZE, Layer
from dinat_triton.plan import Cost

IMAGE, KERNEL, DILATION, BATCH = STUDIES = ("image", "kernel", "dilation", "batch")
IMAGES = (224, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
KERNELS = (3, 5, 7, 9, 11, 13)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LOCAL, DILATED = SERIES = ("local", "dilated")
PATCH, SIDE, HEADS = 4, 56, 2
TILED = "tiled"
DTYPE_OF = {TILED: "float32"}  # of the kernels: bfloat16
ON_PAPER = "not measured: counted from the plan"


@dataclass(frozen=True)
class Case:
    """One layer as one backend would run it.

    Attributes:
        study: What is varied.
        x: Its value.
        series: Local or dilated.
        backend: `tiled`, or the architecture that the kernels are planned for.
        work: Of a forward of the whole batch.
        memory: Bytes that the kernels hold: tensors, bias table, and an index of every row and every column.
        limits: Seconds that each limit of their architecture takes.

    `tiled` has neither: its tiles are copied out group by group, and nobody published the rates of its machine.
    """

    study: str
    x: int
    series: str
    backend: str
    layer: Layer
    batch: int
    work: Work
    memory: float | None = None
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def binds(self) -> str:
        return max(self.limits, key=lambda name: self.limits[name])

    @property
    def seconds(self) -> float:
        """That the largest limit takes."""
        return self.limits[self.binds]

    @property
    def queries(self) -> int:
        """Of all heads and images."""
        return self.batch * self.layer.heads * self.tokens

    @property
    def tokens(self) -> int:
        return self.layer.geometry.num_tokens

    @property
    def tensor_bytes(self) -> int:
        """Of one tensor of the query's size."""
        return self.queries * self.layer.dim * itemsize(self.backend)

    @property
    def full_attention_bytes(self) -> int:
        """What attention of every token to every token holds if it writes its scores out."""
        return 4 * self.tensor_bytes + self.queries * self.tokens * itemsize(self.backend)

    @property
    def gather_bytes(self) -> int:
        """What a copy of every query's keys and values holds."""
        return (4 + 2 * self.layer.geometry.num_pairs // self.tokens) * self.tensor_bytes

    def record(self) -> Record:
        problem = asdict(self.layer) | {"study": self.study, "x": self.x, "series": self.series, "batch": self.batch}
        work = asdict(self.work) | {f"{name}_s": seconds for name, seconds in self.limits.items()}
        work |= {} if self.memory is None else {"memory": self.memory}
        return Record(problem, self.backend, FORWARD, dtype_of(self.backend), reason=ON_PAPER, work=work)

    @classmethod
    def of(cls, record: Record) -> Case:
        problem: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.problem.items()}
        study, x, series, batch = (problem.pop(name) for name in ("study", "x", "series", "batch"))
        work, memory = dict(record.work), record.work.get("memory")
        limits = {name: work[f"{name}_s"] for name in LIMITS if f"{name}_s" in work}
        counted = Work(**{each.name: work[each.name] for each in fields(Work)})
        return cls(study, x, series, record.implementation, Layer(**problem), batch, counted, memory, limits)


def dtype_of(backend: str) -> str:
    return DTYPE_OF.get(backend, "bfloat16")


def itemsize(backend: str) -> int:
    return DTYPES[dtype_of(backend)].itemsize


# What is varied


def problems() -> Iterator[tuple[str, int, str, Layer, int]]:
    """Every study's values: (study, value, series, layer, batch)."""
    for size in IMAGES:
        yield from ((IMAGE, size, series, layer, 1) for series, layer in pair(size // PATCH, KERNEL_SIZE))
    for kernel in KERNELS:
        yield from ((KERNEL, kernel, series, layer, 1) for series, layer in pair(SIDE, kernel))
    for dilation in range(1, SIDE // KERNEL_SIZE + 1):
        yield DILATION, dilation, DILATED, layer_of(SIDE, KERNEL_SIZE, dilation), 1
    for batch in BATCHES:
        yield from ((BATCH, batch, series, layer, batch) for series, layer in pair(SIDE, KERNEL_SIZE))


def pair(side: int, kernel: int) -> Iterator[tuple[str, Layer]]:
    for series, dilation in zip(SERIES, (1, side // kernel), strict=True):
        yield series, layer_of(side, kernel, dilation)


def layer_of(side: int, kernel: int, dilation: int) -> Layer:
    name = f"{side}x{side}-k{kernel}-d{dilation}"
    return Layer(name, (side, side), HEADS, (dilation, dilation), 1, (kernel, kernel), HEAD_DIM)


# What it costs


def cases(arch: str) -> list[Case]:
    """All studies for `tiled` and for the kernels on an architecture."""
    from dinat_triton.bench.ceilings import ceilings_of

    ceilings = ceilings_of(arch)
    found = []
    for study, x, series, layer, batch in problems():
        (sweep,) = kernel_sweeps(layer, batch, arch)
        work = Work.of(layer, batch, FORWARD, itemsize(arch), [sweep])
        memory = work.bytes + plan_bytes(sweep.cost, layer.heads)
        limits = work.limits(ceilings, dtype_of(arch))
        found.append(Case(study, x, series, arch, layer, batch, work, memory, limits))
        work = Work.of(layer, batch, FORWARD, itemsize(TILED), cpu_sweeps(layer, batch, FORWARD))
        found.append(Case(study, x, series, TILED, layer, batch, work))
    return found


def kernel_sweeps(layer: Layer, batch: int, arch: str) -> list[Sweep]:
    """The forward kernel's, without the index arrays that its launch would need."""
    from dinat_triton.kernels.configs import choose_config, choose_plan, padded
    from dinat_triton.offline.estimate import TRAFFIC

    itembytes = itemsize(arch)
    maps = batch * layer.heads
    config = choose_config(FORWARD, padded(layer.dim), 8 * itembytes, arch, geometry=layer.geometry, maps=maps)
    cost = choose_plan(layer.geometry, config, layer.dim * itembytes).cost()
    traffic = TRAFFIC[FORWARD]
    return [Sweep(cost, traffic.rows + traffic.columns, traffic.numbers, traffic.products)]


def plan_bytes(cost: Cost, heads: int) -> int:
    """Of a plan in memory: an index of every row and column, and its table's bias indices and biases."""
    return 4 * (cost.queries + cost.col_loads) + 4 * (1 + heads) * cost.table_entries


# The command


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", default="sm_90", help="GPU that the kernels are planned for (default: sm_90)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="draw scaling.png and memory.png there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was counted")


def run(args: argparse.Namespace) -> int:
    from dinat_triton.offline.targets import TARGETS

    check_names("architecture", [args.arch], TARGETS)
    check_outputs(file=args.json, folder=args.out)
    found = cases(args.arch)
    print("\n\n".join(table([case for case in found if case.study == study]) for study in STUDIES))
    if args.json is not None:
        harness.save(args.json, harness.environment(), [case.record() for case in found])
    if args.out is not None:
        from dinat_triton import plots
        from dinat_triton.bench import figures

        plots.save(figures.plot_scaling(found), args.out / "scaling.png")
        plots.save(figures.plot_memory(found), args.out / "memory.png")
    return 0


def table(found: Sequence[Case]) -> str:
    """Of one study. Megabytes and microseconds are of the whole batch."""
    header = [found[0].study, "layer", "backend", "scores", "useful", "MB moved", "MB held", "MB if N^2", "us", "binds"]
    rows = []
    for case in found:
        memory = (case.work.bytes, case.memory, case.full_attention_bytes)
        rows.append(
            [f"{case.x}", f"{case.series} d{case.layer.dilation[0]}", case.backend]
            + [f"{case.work.scores:.0f}", f"{case.work.useful_scores:.0f}"]
            + ["-" if each is None else f"{each / 1e6:,.1f}" for each in memory]
            + ([f"{1e6 * case.seconds:.1f}", case.binds] if case.limits else ["-", "-"])
        )
    return harness.table(header, rows)
