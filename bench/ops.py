"""The attention layers of the models, one by one, side by side with what others offer for them.

Every implementation gets the same tensors, warm. On a CPU they take turns, so that a busy moment meets them all; on a
GPU each is timed by events with a cold L2, and ours once more as a CUDA graph, without Python in between.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dinat_triton as dt
from dinat_triton.bench import compare, harness, peers, roofline
from dinat_triton.bench.ceilings import measure_ceilings
from dinat_triton.bench.harness import BACKWARD, FORWARD, FORWARD_BACKWARD, Record, Timing
from dinat_triton.bench.outputs import check_outputs
from dinat_triton.bench.peers import PEERS, Attention, Inputs, Peer, Problem
from dinat_triton.bench.selection import LAYERS_HELP, check_names, find_device, find_layers, split
from dinat_triton.layers import Layer
from dinat_triton.progress import ProgressBar

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OURS = {"cpu": "tiled", "cuda": "triton"}
DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
# On a GPU a backward has floors and targets of its own; on a CPU what counts is a step.
TRAINING = {"cpu": FORWARD_BACKWARD, "cuda": BACKWARD}
# Without those that a CPU cannot run or not in time. On a GPU, those that compile long come last.
DEFAULT_PEERS = {
    "cpu": ("flex", "flex-tuned", "natten", "gather", "gather-tuned", "swin"),
    "cuda": ("natten", "natten-cutlass-fna", "natten-hopper-fna", "sdpa", "swin", "gather-tuned", "flex-tuned", "flex"),
}
# How far a peer's output may be from ours: far above rounding, far below a mistake.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}
DIFFERS = "its result differs from ours"
TIME_IS_UP = "the time was up"
SECONDS = 0.3


@dataclass(frozen=True)
class Cell:
    """What is measured side by side."""

    problem: Problem
    dtype: torch.dtype
    pass_: str

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def backward(self) -> bool:
        return self.pass_ != FORWARD

    def __str__(self) -> str:
        return f"{self.problem.label} {self.dtype_name} {self.pass_}"

    def record(self, implementation: str, **found: Any) -> Record:
        return Record(self.problem.to_dict(), implementation, self.pass_, self.dtype_name, **found)


def problem_of(model: str, layer: Layer, batch: int) -> Problem:
    return Problem(
        model, layer.name, layer.shape, layer.heads, layer.dim, layer.kernel_size, layer.dilation, batch, layer.count
    )


def layers_name(model: str, layer: str) -> str:
    """What a layer belongs to, such as `dinat_mini@224`."""
    return f"{model}@{layer.partition('/')[0]}"


def layer_of(problem: Problem) -> Layer:
    p = problem
    return Layer(p.name, p.shape, p.heads, p.dilation, p.weight, p.kernel_size, p.dim)


# Ours


def prepare_ours(problem: Problem, inputs: Inputs, backend: str, bias: bool = True) -> Attention:
    function = (dt.na1d, dt.na2d, dt.na3d)[len(problem.shape) - 1]
    options: dict[str, Any] = {"dilation": problem.dilation, "backend": backend, "rpb": inputs.rpb if bias else None}
    tensors = (inputs.query, inputs.key, inputs.value)
    return Attention(lambda: function(*tensors, problem.kernel_size, **options), inputs.leaves)


def ours(backend: str) -> Peer:
    return Peer(backend, partial(prepare_ours, backend=backend))


def ours_graphed(backend: str) -> Peer:
    return Peer(f"{backend} graph", partial(prepare_ours, backend=backend), graph=True)


# What takes how long


@dataclass(frozen=True)
class Bench:
    """Measures cells.

    Attributes:
        device: Where.
        backend: Ours, that every peer has to agree with.
        ceilings: What the device allows, as `measure_ceilings` finds it.
        seconds: For each implementation of a cell.
        deadline: By `time.monotonic`; nothing is begun after it.
    """

    device: torch.device
    backend: str
    ceilings: Mapping[str, Any]
    seconds: float = SECONDS
    deadline: float = math.inf

    def measure(
        self, cell: Cell, implementations: Sequence[Peer], note: Callable[[str], None] = lambda text: None
    ) -> list[Record]:
        """A record of each implementation: its timing, or why there is none."""
        if time.monotonic() > self.deadline:
            return [cell.record(peer.name, reason=TIME_IS_UP) for peer in implementations]
        calls: dict[str, Callable[[], object]] = {}
        reasons: dict[str, str] = {}
        with torch.set_grad_enabled(cell.backward):
            inputs = Inputs.of(cell.problem, cell.dtype, self.device, requires_grad=cell.backward)
            for peer in implementations:
                note(f"{cell}: preparing {peer.name}")
                call = self.prepare(peer, cell, inputs)
                if isinstance(call, str):
                    reasons[peer.name] = call
                else:
                    calls[peer.name] = call
            note(f"{cell}: measuring")
            timings = harness.measure_on(self.device, calls, self.seconds)
        del calls, inputs
        self._clear()
        return [self._record(cell, peer.name, timings, reasons) for peer in implementations]

    def prepare(self, peer: Peer, cell: Cell, inputs: Inputs) -> Callable[[], object] | str:
        """A warm callable whose output agrees with ours, or the reason why there is none."""
        if reason := peer.obstacle(inputs):
            return reason
        try:
            attention = peer.prepare(cell.problem, inputs)
            if reason := self._difference(peer, attention, cell, inputs):
                return reason
            make = partial(call_of, attention, cell.pass_, inputs.grad_out)
            call = graphed(make) if peer.graph else make()
            call()
        except Exception as error:
            self._clear()
            return f"{type(error).__name__}: {first_line(error)}"
        return call

    def _difference(self, peer: Peer, attention: Attention, cell: Cell, inputs: Inputs) -> str | None:
        out = attention.call()
        if not peer.same_function or peer.name == self.backend:
            return None
        expected = prepare_ours(cell.problem, inputs, self.backend, peer.has_bias).call()
        difference = (out - expected).abs().max().item()
        return None if difference <= TOLERANCE[cell.dtype] else f"{DIFFERS} by {difference:.1e}"

    def _record(self, cell: Cell, name: str, timings: Mapping[str, Timing], reasons: Mapping[str, str]) -> Record:
        timing = timings.get(name)
        needed = work(cell, self.device, self.ceilings)
        if timing is not None:
            needed["fraction_of_floor"] = round(needed["floor_ms"] / timing.median, 4)
            if name == self.backend:
                needed |= product_fractions(cell, self.device, timing.median / 1e3, self.ceilings)
        return cell.record(name, timing=timing, reason=reasons.get(name), work=needed)

    def _clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def call_of(attention: Attention, pass_: str, grad_out: Tensor) -> Callable[[], object]:
    """What a pass runs. A backward alone keeps its graph, to run again."""
    if pass_ == FORWARD:
        return attention.call
    if pass_ == BACKWARD:
        out = attention.call()
        return lambda: torch.autograd.grad(out, attention.leaves, grad_out, retain_graph=True)
    return lambda: torch.autograd.grad(attention.call(), attention.leaves, grad_out)


def graphed(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """The same work without Python in between.

    A backward runs on the stream that its forward ran on, so both have to be made on the stream that is captured.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA graphs need a GPU")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = make()
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def work(cell: Cell, device: torch.device, ceilings: Mapping[str, Any]) -> dict[str, float]:
    """Bytes and operations that nothing can do without, and the milliseconds that the largest of them takes.

    On a CPU bytes make no floor: what is called again and again lies in a cache.
    """
    p = cell.problem
    products, tensors = roofline.NEEDED[cell.pass_]
    token = p.batch * p.heads * p.dim
    moved = tensors * token * p.tokens * cell.dtype.itemsize
    pairs = p.tokens * math.prod(p.kernel_size)
    flops = 2 * products * pairs * token
    exps = len(cell.pass_.split("+")) * pairs * p.batch * p.heads
    seconds = [flops / roofline.product_rate(ceilings, cell.dtype_name), exps / ceilings["exps_per_s"]]
    if device.type == "cuda":
        seconds.append(moved / ceilings["copy_bytes_per_s"])
    return {"bytes": moved, "flops": flops, "floor_ms": round(1e3 * max(seconds), 6)}


def product_fractions(
    cell: Cell, device: torch.device, seconds: float, ceilings: Mapping[str, Any]
) -> dict[str, float]:
    """Which fraction of the device's matrix products we reach: counting all of a tile's scores, and the useful ones."""
    layer, batch = layer_of(cell.problem), cell.problem.batch
    if device.type == "cuda":
        sweeps = roofline.gpu_sweeps(layer, batch, cell.pass_, cell.dtype, device)
    else:
        sweeps = roofline.cpu_sweeps(layer, batch, cell.pass_)
    counted = roofline.Work.of(layer, batch, cell.pass_, cell.dtype.itemsize, sweeps)
    most = seconds * roofline.product_rate(ceilings, cell.dtype_name)
    return {
        "evaluated_flops": counted.flops,
        "fraction_of_products": round(counted.flops / most, 4),
        "useful_fraction_of_products": round(counted.useful_flops / most, 4),
    }


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200]


# What was found


def report(records: Sequence[Record], backend: str) -> str:
    """Per layer the times, then the means, then why something has no time."""
    names = list(dict.fromkeys(r.implementation for r in records if r.implementation != backend))
    parts = [layer_table(records, backend, names)]
    if means := summarize(records, backend):
        parts += ["", "Geometric means of time over ours, each layer as often as the model has it", ""]
        parts.append(mean_table(means, names))
    return "\n".join([*parts, *reasons(records)])


def layer_table(records: Sequence[Record], backend: str, names: Sequence[str]) -> str:
    """Milliseconds of each implementation, and how many times ours they are."""
    cells: dict[tuple[str, str, str], dict[str, Record]] = {}
    for record in records:
        cells.setdefault(record.cell, {})[record.implementation] = record
    rows = []
    for found in cells.values():
        mine = found.get(backend)
        others = [_shown(found.get(name), mine) for name in names]
        rows.append([next(iter(found.values())).title, _shown(mine, None), *_fractions(mine), *others])
    header = ["median ms (times ours)", backend, "of floor", "of products", "useful", *names]
    return harness.table(header, rows)


def _fractions(mine: Record | None) -> list[str]:
    """Of the floor, and of the device's products, all that we evaluate and the useful ones."""
    names = ("fraction_of_floor", "fraction_of_products", "useful_fraction_of_products")
    found = [None if mine is None else mine.work.get(name) for name in names]
    return ["-" if fraction is None else f"{fraction:.0%}" for fraction in found]


def _shown(record: Record | None, mine: Record | None) -> str:
    if record is None or record.timing is None:
        return "-"
    time_ = harness.milliseconds(record.timing.median)
    ratio = mine.ratios.get(record.implementation) if mine else None
    return time_ if ratio is None else f"{time_} ({ratio:.2f}x)"


def reasons(records: Iterable[Record]) -> list[str]:
    """Why implementations have no time, each reason once with the number of cells it holds for."""
    cells: dict[str, int] = {}
    for r in records:
        if r.reason:
            line = f"- {r.implementation}, {r.pass_}, {r.dtype}: {r.reason}"
            cells[line] = cells.get(line, 0) + 1
    return ["", *(f"{line} ({n} layers)" if n > 1 else line for line, n in sorted(cells.items()))] if cells else []


def summarize(records: Sequence[Record], backend: str) -> list[dict[str, Any]]:
    """Geometric means over the layers of a model at a setting, each as often as the model has it."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        if record.implementation == backend and record.ratios:
            problem = record.problem
            layers = layers_name(problem["model"], problem["name"])
            groups.setdefault((layers, problem["batch"], record.dtype, record.pass_), []).append(record)
    means = []
    for (layers, batch, dtype, pass_), mine in groups.items():
        ratios, measured = {}, {}
        for name in dict.fromkeys(name for record in mine for name in record.ratios):
            having = [record for record in mine if name in record.ratios]
            weights = [record.problem["weight"] for record in having]
            ratios[name] = round(harness.geometric_mean([r.ratios[name] for r in having], weights), 3)
            measured[name] = len(having)
        means.append(
            {"layers": layers, "batch": batch, "dtype": dtype, "pass": pass_, "count": len(mine), "ratios": ratios,
             "measured": measured}
        )  # fmt: skip
    return means


def mean_table(means: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Means, with `of` where they are of fewer layers than ours has."""

    def shown(mean: Mapping[str, Any], name: str) -> str:
        if name not in mean["ratios"]:
            return "-"
        of = "" if mean["measured"][name] == mean["count"] else f" ({mean['measured'][name]} of {mean['count']})"
        return f"{mean['ratios'][name]:.2f}x{of}"

    rows = [
        [f"{m['layers']} b{m['batch']} {m['dtype']} {m['pass']}", *(shown(m, name) for name in names)] for m in means
    ]
    return harness.table(["", *names], rows)


# The command


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", nargs="+", default=["dinat_mini@224"], metavar="LAYERS",
                        help=f"{LAYERS_HELP} (default: dinat_mini@224)")  # fmt: skip
    add_peers(parser)
    parser.add_argument("--dtype", nargs="+", metavar="DTYPE", help=f"of {', '.join(DTYPES)} (default: float32 on a "
                        "CPU, bfloat16 on a GPU)")  # fmt: skip
    parser.add_argument("--backward", action="store_true",
                        help="the backward too: on a GPU alone, on a CPU together with the forward")  # fmt: skip
    parser.add_argument("--batch", type=int, help="images (default: 1 on a CPU, 128 on a GPU, of coco 16)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin nothing after this time")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a peer's result differs from ours")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the results")
    compare.add_option(parser)


def add_peers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS)} (default: those that make "
                        "sense on the device; none with nothing behind it)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Returns 1 if ours failed, or if a peer's result differs and that was asked for."""
    if args.compare:
        return compare.compare_files(*args.compare)
    device = find_device(args.device)
    backend, chosen = OURS[device.type], find_peers(args.peers, device)
    cells = find_cells(args, device)
    check_outputs(file=args.out)
    harness.prepare_process(args.threads)
    env = harness.environment(device)
    deadline = math.inf if args.budget is None else time.monotonic() + args.budget
    bench = Bench(device, backend, measure_ceilings(device), deadline=deadline)
    implementations = [ours(backend), *([ours_graphed(backend)] if device.type == "cuda" else []), *chosen]
    records = measure_all(bench, cells, implementations)
    print(report(records, backend))
    if args.out is not None:
        save(args.out, env, records, bench)
        print(f"\nWrote {harness.shown(args.out)}")
    return verdict(records, backend, args.strict)


def find_peers(words: Sequence[str] | None, device: torch.device) -> list[Peer]:
    names = DEFAULT_PEERS[device.type] if words is None else split(words)
    check_names("peer", names, PEERS)
    return [PEERS[name] for name in dict.fromkeys(names)]


def find_cells(args: argparse.Namespace, device: torch.device) -> list[Cell]:
    for name in ("batch", "threads", "budget"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} must be positive, got {value}")
    dtypes = split(args.dtype or [DEFAULT_DTYPE[device.type]])
    check_names("dtype", dtypes, DTYPES)
    passes = [FORWARD, *([TRAINING[device.type]] if args.backward else [])]
    problems = []
    for model, layer in find_layers(args.layers):
        batch = args.batch or roofline.default_batch(layers_name(model, layer.name), device)
        problems.append(problem_of(model, layer, batch))
    return [Cell(problem, DTYPES[dtype], pass_) for problem in problems for dtype in dtypes for pass_ in passes]


def measure_all(bench: Bench, cells: Sequence[Cell], implementations: Sequence[Peer]) -> list[Record]:
    """All cells with a progress bar, and the ratios to ours."""
    peers.quiet()
    progress = ProgressBar(len(cells))
    records: list[Record] = []
    for cell in cells:
        records += bench.measure(cell, implementations, progress.note)
        progress.step(str(cell))
    progress.close()
    harness.add_ratios(records, bench.backend)
    return records


def save(path: Path, env: Mapping[str, Any], records: Sequence[Record], bench: Bench, **more: Any) -> None:
    harness.save(path, env, records, ceilings=dict(bench.ceilings), summary=summarize(records, bench.backend), **more)


def verdict(records: Sequence[Record], backend: str, strict: bool) -> int:
    """The exit code. What nobody had time for is no failure."""
    failed = [r for r in records if r.implementation == backend and r.reason not in (None, TIME_IS_UP)]
    differing = [r for r in records if strict and r.reason and r.reason.startswith(DIFFERS)]
    for record in (*failed, *differing):
        print(f"FAILED {record.title}, {record.implementation}: {record.reason}")
    return 1 if failed or differing else 0
