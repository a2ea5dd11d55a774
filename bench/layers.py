"""The attention layers of the models, one by one, side by side with what others offer for them.

Every implementation gets the same tensors, warm, and is timed only if its output agrees with ours. On a CPU they take
turns, so that a busy moment meets them all; on a GPU each is timed by events with a cold L2, and ours once more as a
CUDA graph, without Python in between.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import dinat_triton as dt
from dinat_triton.bench import harness, roofline
from dinat_triton.bench.ceilings import measure_ceilings
from dinat_triton.bench.harness import TIME_IS_UP, Cell, Record, Results, elapsed_ms
from dinat_triton.bench.peers import PEERS, Attention, Inputs, Peer
from dinat_triton.commands import options
from dinat_triton.commands.options import BATCH_HELP, DTYPES, LAYERS_HELP, check_names, check_positive
from dinat_triton.commands.tables import milliseconds, table
from dinat_triton.layers import Layer
from dinat_triton.tuner.layer_run import first_line
from dinat_triton.work import BACKWARD, FORWARD, FORWARD_BACKWARD, Ceilings, Work

OURS = {"cpu": "tiled", "cuda": "triton"}
DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
DEFAULT_BATCH = {"cpu": 1, "cuda": 128}
# On a GPU a backward has a floor of its own; on a CPU a step counts.
TRAINING = {"cpu": FORWARD_BACKWARD, "cuda": BACKWARD}
# Without those that a CPU cannot run or not in time. On a GPU, those that compile long come last.
DEFAULT_PEERS = {
    "cpu": ("flex", "flex-tuned", "natten", "gather", "gather-tuned", "swin"),
    "cuda": ("natten", "natten-cutlass-fna", "natten-hopper-fna", "sdpa", "swin", "flex-tuned", "gather-tuned", "flex"),
}
# How far a peer's output may be from ours: far above rounding, far below a mistake.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}
SECONDS = 0.3


def prepare_ours(layer: Layer, inputs: Inputs, backend: str, bias: bool = True) -> Attention:
    function = (dt.na1d, dt.na2d, dt.na3d)[len(layer.shape) - 1]
    window: dict[str, Any] = {"kernel_size": layer.kernel_size, "dilation": layer.dilation, "stride": layer.stride}
    rpb, qkv = inputs.rpb if bias else None, (inputs.query, inputs.key, inputs.value)
    return Attention(lambda: function(*qkv, **window, rpb=rpb, backend=backend), inputs.leaves)


def ours(device: torch.device) -> list[Peer]:
    """The backend of a device; on a GPU as a graph, too."""
    name = OURS[device.type]
    call = partial(prepare_ours, backend=name)
    return [Peer(name, call), *([Peer(f"{name} graph", call, graph=True)] if device.type == "cuda" else [])]


# Measuring


@dataclass(frozen=True)
class Bench:
    """Measures cells on a device; nothing is begun after the deadline, by `time.monotonic`."""

    device: torch.device
    seconds: float = SECONDS
    deadline: float = math.inf

    def measure(self, cell: Cell, implementations: Sequence[Peer]) -> list[Record]:
        """A record of each implementation: its timing, or why there is none."""
        records = {peer.name: cell.record(peer.name) for peer in implementations}
        calls: dict[str, Callable[[], object]] = {}
        training = cell.pass_ != FORWARD
        with torch.set_grad_enabled(training):
            inputs = Inputs.of(cell.layer, getattr(torch, cell.dtype), self.device, requires_grad=training)
            for peer in implementations:
                if time.monotonic() > self.deadline:
                    records[peer.name].reason = TIME_IS_UP
                else:
                    calls |= self.prepare(peer, cell, inputs, records[peer.name])
            for name, timing in harness.measure_on(self.device, calls, self.seconds).items():
                records[name].timing = timing
        del calls, inputs
        self._clear()
        for record in records.values():
            if record.timing and record.is_ours:
                record.also["work"] = asdict(roofline.work_of(cell, self.device))
        return list(records.values())

    def prepare(self, peer: Peer, cell: Cell, inputs: Inputs, record: Record) -> Mapping[str, Callable[[], object]]:
        """A warm call whose output agrees with ours, by its name; or nothing, and the record says why."""
        record.reason = peer.obstacle(cell.layer, inputs)
        if record.reason:
            return {}
        try:
            attention = peer.prepare(cell.layer, inputs)
            record.also["first_call_ms"] = round(elapsed_ms(attention.call, self.device.type), 2)
            record.reason = self.difference(peer, attention, cell, inputs)
            if record.reason:
                return {}
            make = partial(call_of, attention, cell.pass_, inputs.grad_out)
            call = graphed(make) if peer.graph else make()
            call()
            return {peer.name: call}
        except Exception as error:
            self._clear()
            record.reason = first_line(error)
            return {}

    def difference(self, peer: Peer, attention: Attention, cell: Cell, inputs: Inputs) -> str | None:
        """Difference of an output from ours, if there is one."""
        if not peer.same_function or peer.name == OURS[self.device.type]:
            return None
        out = attention.call()
        expected = prepare_ours(cell.layer, inputs, OURS[self.device.type], peer.has_bias).call()
        difference = (out - expected).abs().max().item()
        return None if difference <= TOLERANCE[out.dtype] else f"its result differs from ours by {difference:.1e}"

    def _clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def call_of(attention: Attention, pass_: str, grad_out: Tensor) -> Callable[[], object]:
    """The call of a pass. A backward alone keeps its graph, to run again."""
    if pass_ == FORWARD:
        return attention.call
    if pass_ == BACKWARD:
        out = attention.call()
        return lambda: torch.autograd.grad(out, attention.leaves, grad_out, retain_graph=True)
    return lambda: torch.autograd.grad(attention.call(), attention.leaves, grad_out)


def graphed(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """Captures work in a graph, to repeat it without Python in between.

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
    return partial(_replay, graph, call)


def _replay(graph: torch.cuda.CUDAGraph, call: Callable[[], object]) -> None:
    """Replays a graph. What `call` holds, such as a model, has to live as long: the graph reads its memory."""
    graph.replay()


# The command


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", nargs="+", default=["dinat_mini@224"], metavar="LAYERS",
                        help=f"{LAYERS_HELP} (default: dinat_mini@224)")  # fmt: skip
    parser.add_argument("--peers", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS)} (default: those that make "
                        "sense on the device; none with nothing behind it)")  # fmt: skip
    parser.add_argument("--dtype", nargs="+", metavar="DTYPE", help=f"of {', '.join(DTYPES)} (default: float32 on a "
                        "CPU, bfloat16 on a GPU)")  # fmt: skip
    parser.add_argument("--backward", action="store_true",
                        help="the backward too: on a GPU alone, on a CPU together with the forward")  # fmt: skip
    parser.add_argument("--batch", type=int, nargs="+", help=f"{BATCH_HELP} (default: 1 on a CPU, 128 on a GPU)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for each time (default: {SECONDS})")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin nothing after this time")


def run(args: argparse.Namespace) -> Results:
    check_positive(args, "batch", "seconds", "budget")
    device = options.find_device(args.device)
    names = DEFAULT_PEERS[device.type] if args.peers is None else options.split(args.peers)
    dtypes = options.split(args.dtype or [DEFAULT_DTYPE[device.type]])
    check_names("peer", names, PEERS)
    check_names("dtype", dtypes, DTYPES)
    batches = args.batch or [DEFAULT_BATCH[device.type]]
    layers = [layer for batch in batches for layer in options.find_layers(args.layers, batch=batch)]
    passes = [FORWARD, *([TRAINING[device.type]] if args.backward else [])]
    cells = [Cell(layer, dtype, pass_) for layer in layers for dtype in dtypes for pass_ in passes]
    deadline = math.inf if args.budget is None else time.monotonic() + args.budget
    environment = harness.environment(device)
    ceilings = measure_ceilings(device)
    bench = Bench(device, args.seconds, deadline)
    turns = [*ours(device), *(PEERS[name] for name in dict.fromkeys(names))]
    # On a GPU there is nothing to take turns for: ours comes first everywhere, if the budget ends early.
    groups = [[peer] for peer in turns] if device.type == "cuda" else [turns]
    todo = [(cell, group) for group in groups for cell in cells]
    records: list[Record] = []
    with harness.stoppable():
        for cell, group in tqdm(todo, "layers", disable=None):
            records += bench.measure(cell, group)
    return Results("layers", environment, records, ceilings)


# The report


def report(results: Results) -> str:
    """Per layer the times, then the means, then why something has no time."""
    cells = list(cells_of(results.records))
    names = list(dict.fromkeys(r.implementation for r in results.records if not is_backend(r)))
    header = ["median ms (times ours)", "ours", "first call", "of floor", *names]
    rows = [_row(mine, found, names, results) for mine, found in cells]
    parts = [table(header, rows)]
    if means := summarize(results.records):
        parts += ["", "Geometric means of time over ours, each layer as often as the model has it", ""]
        parts.append(
            table(["", *names], [[title, *(shown.get(n, "-") for n in names)] for title, shown in means.items()])
        )
    return "\n".join([*parts, "", *harness.reasons(results.records)])


def is_backend(record: Record) -> bool:
    return record.implementation in OURS.values()


def cells_of(records: Sequence[Record]) -> Iterator[tuple[Record | None, dict[str, Record]]]:
    """Our record of every cell, and everyone's by name."""
    cells: dict[tuple[str, str, str], dict[str, Record]] = {}
    for record in records:
        cells.setdefault(record.cell, {})[record.implementation] = record
    for found in cells.values():
        yield next(filter(is_backend, found.values()), None), found


def _row(mine: Record | None, found: Mapping[str, Record], names: Sequence[str], results: Results) -> list[str]:
    first = mine or next(iter(found.values()))
    row = [f"{first.problem['name']} h{first.problem['heads']} b{first.problem['batch']} {first.dtype} {first.pass_}"]
    if mine is None or mine.timing is None:
        row += ["-"] * 3
    else:
        first_call, ceilings = mine.also.get("first_call_ms"), results.ceilings
        row += [milliseconds(mine.timing.median), milliseconds(first_call) if first_call else "-"]
        row += [f"{share_of_floor(mine, ceilings, results.environment['device_type']):.0%}" if ceilings else "-"]
    return [*row, *(_shown(found.get(name), mine) for name in names)]


def _shown(record: Record | None, mine: Record | None) -> str:
    if record is None or record.timing is None:
        return "-"
    time_ = milliseconds(record.timing.median)
    return f"{time_} ({record.timing.median / mine.timing.median:.2f}x)" if mine and mine.timing else time_


def share_of_floor(mine: Record, ceilings: Ceilings, device_type: str) -> float:
    """Time that no implementation can do without, over ours.

    On a CPU bytes make no floor: what is called again and again lies in a cache.
    """
    assert mine.timing is not None
    floors = Work(**mine.also["work"]).useful_limits(ceilings, mine.dtype)
    floor = max(value for name, value in floors.items() if device_type == "cuda" or name != "memory")
    return 1e3 * floor / mine.timing.median


def summarize(records: Sequence[Record]) -> dict[str, dict[str, str]]:
    """Geometric means over the layers of a model at a setting, with `of` where they are of fewer layers than ours."""
    groups: dict[str, list[tuple[Record, dict[str, Record]]]] = {}
    for mine, found in cells_of(records):
        if mine is not None and mine.timing and len(found) > 1:
            group = Layer(**mine.problem).group
            groups.setdefault(f"{group} b{mine.problem['batch']} {mine.dtype} {mine.pass_}", []).append((mine, found))
    means: dict[str, dict[str, str]] = {}
    for title, cells in groups.items():
        for name in dict.fromkeys(name for mine, found in cells for name in found if found[name] is not mine):
            timed = [(mine, r) for mine, found in cells if (r := found.get(name)) and r.timing]
            ratios = [r.timing.median / mine.timing.median for mine, r in timed if r.timing and mine.timing]
            if ratios:
                mean = harness.geometric_mean(ratios, [mine.problem["count"] for mine, _ in timed])
                of = "" if len(timed) == len(cells) else f" ({len(timed)} of {len(cells)})"
                means.setdefault(title, {})[name] = f"{mean:.2f}x{of}"
    return means
