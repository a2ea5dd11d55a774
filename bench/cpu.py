"""The `tiled` backend on the CPU, side by side with what else computes the layers of DiNAT-Mini there.

python -m dinat_triton.bench.cpu            # every layer, a few minutes, most of them to compile FlexAttention
python -m dinat_triton.bench.cpu --quick    # two small stages
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dinat_triton as dt
from dinat_triton.bench import harness, peers
from dinat_triton.bench.harness import FORWARD, FORWARD_BACKWARD, PASSES, Record
from dinat_triton.bench.peers import Call, Inputs, Peer, Problem

OURS = "tiled"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RESOLUTIONS = (224, 384)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
TARGETS = ((FORWARD, "flex", 30.0), (FORWARD, "gather", 10.0), (FORWARD_BACKWARD, "gather", 10.0))
"""Least ratio of a peer's time to ours: geometric mean over the layers at 224, float32."""

MEMORY_PROBLEM = Problem("200x304-d28", (200, 304), 2, 32, (7, 7), (28, 28))
MEMORY_TARGET = 12.0
"""Most bytes, beyond those of the inputs, as a multiple of the query's."""

QUICK_LAYERS = ("224/28x28", "224/7x7")
BUDGET = 0.3
QUICK_BUDGET = 0.15


@dataclass(frozen=True)
class Cell:
    """What is measured side by side."""

    problem: Problem
    dtype: torch.dtype
    pass_: str

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.problem.name} {self.dtype_name} {self.pass_}"

    def record(self, implementation: str, **found: Any) -> Record:
        return Record(self.problem.to_dict(), implementation, self.pass_, self.dtype_name, **found)


class Progress:
    """One line on stderr, rewritten in place on a terminal; elsewhere a line for each cell."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.terminal = sys.stderr.isatty()

    def step(self, what: object) -> None:
        self.done += 1
        self.line = f"{self.done}/{self.total} {what}"
        self._write("" if self.terminal else "\n")

    def detail(self, what: str) -> None:
        if self.terminal:
            self._write(f": {what}")

    def close(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _write(self, end: str) -> None:
        start = "\r\033[K" if self.terminal else ""
        elapsed = time.monotonic() - self.start
        print(f"{start}[{elapsed:4.0f} s] {self.line}", end=end, file=sys.stderr, flush=True)


def run_ours(problem: Problem, inputs: Inputs, *, bias: bool = True) -> Tensor:
    function = (dt.na1d, dt.na2d, dt.na3d)[len(problem.shape) - 1]
    rpb = inputs.rpb if bias else None
    query, key, value = inputs.query, inputs.key, inputs.value
    return function(query, key, value, problem.kernel_size, dilation=problem.dilation, rpb=rpb, backend=OURS)


def out_of_scope(peer: Peer, cell: Cell) -> str | None:
    """What is left out to end in time."""
    if peer.name == "flex" and cell.dtype != torch.float32:
        return "compiled anew for every layer, so measured in float32 only; flex-tuned is measured everywhere"
    return None


def prepare(peer: Peer, cell: Cell, inputs: Inputs) -> Call | str:
    """A warm callable that agrees with us, or the reason why there is none."""
    if reason := peer.obstacle(inputs) or out_of_scope(peer, cell):
        return reason
    try:
        call = peer.prepare(cell.problem, inputs)
        difference = (call() - run_ours(cell.problem, inputs, bias=peer.has_bias)).abs().max().item()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if not difference <= TOLERANCE[cell.dtype]:
        return f"its result differs from ours by {difference:.1e}"
    return call


def differentiated(call: Call, inputs: Inputs, has_bias: bool) -> Callable[[], object]:
    leaves = inputs.leaves if has_bias else inputs.leaves[:3]
    return lambda: torch.autograd.grad(call(), leaves, inputs.grad_out)


def measure_cell(cell: Cell, chosen: Sequence[Peer], budget: float, progress: Progress) -> list[Record]:
    backward = cell.pass_ == FORWARD_BACKWARD
    inputs = Inputs.of(cell.problem, cell.dtype, requires_grad=backward)
    ours = Peer(OURS, lambda problem, inputs: lambda: run_ours(problem, inputs))
    calls: dict[str, Callable[[], object]] = {}
    reasons: dict[str, str] = {}
    with torch.set_grad_enabled(backward):
        for peer in (ours, *chosen):
            progress.detail(f"preparing {peer.name}")
            call = prepare(peer, cell, inputs)
            if isinstance(call, str):
                reasons[peer.name] = call
            elif backward:
                calls[peer.name] = differentiated(call, inputs, peer.has_bias)
                calls[peer.name]()
            else:
                calls[peer.name] = call
        if OURS in reasons:
            raise RuntimeError(f"{OURS} cannot run {cell}: {reasons[OURS]}")
        progress.detail("measuring")
        timings = harness.measure(calls, budget=budget)
    names = [OURS, *(peer.name for peer in chosen)]
    return [cell.record(name, timing=timings.get(name), reason=reasons.get(name)) for name in names]


def peak_memory(pass_: str, threads: int) -> dict[str, Any]:
    """Measures in a fresh process, whose allocator gives freed memory back at once: what counts is what is live."""
    command = [sys.executable, "-m", "dinat_triton.bench.cpu", "--measure-memory", pass_, "--threads", str(threads)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode:
        lines = child.stderr.strip().splitlines() or ["no message"]
        return {"pass": pass_, "over_q": None, "reason": lines[-1]}
    return json.loads(child.stdout.splitlines()[-1])


def measure_memory(pass_: str) -> dict[str, Any]:
    """In the child. The first call also builds the plan, which stays cached; a later call finds it there."""
    backward = pass_ == FORWARD_BACKWARD

    def run(problem: Problem, inputs: Inputs) -> None:
        with torch.set_grad_enabled(backward):
            out = run_ours(problem, inputs)
            grads = torch.autograd.grad(out, inputs.leaves, inputs.grad_out) if backward else ()
        del out, grads

    small = Problem("small", (28, 28), 2, 32, (7, 7), (4, 4))
    run(small, Inputs.of(small, requires_grad=backward))
    inputs = Inputs.of(MEMORY_PROBLEM, requires_grad=backward)
    query_bytes = inputs.query.numel() * inputs.query.element_size()
    first, later = (_peak(lambda: run(MEMORY_PROBLEM, inputs)) for _ in range(2))
    return {
        "pass": pass_,
        "problem": MEMORY_PROBLEM.to_dict(),
        "dtype": "float32",
        "query_bytes": query_bytes,
        "first_call_bytes": first,
        "later_call_bytes": later,
        "over_q": round(max(first, later) / query_bytes, 3),
        "reason": None,
    }


def _peak(run: Callable[[], None]) -> int:
    """Bytes by which the resident set grew at most during a call."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return 1024 * int(found[1])


def layer_table(records: Sequence[Record], names: Sequence[str]) -> str:
    """Milliseconds of each implementation, and how many times ours they are."""
    cells: dict[tuple[str, str, str], dict[str, Record]] = {}
    for record in records:
        key = (record.problem["name"], record.dtype, record.pass_)
        cells.setdefault(key, {})[record.implementation] = record
    rows = []
    for key, of_cell in cells.items():
        ratios = of_cell[OURS].ratios | {OURS: 1.0}
        timings = {name: of_cell[name].timing for name in (OURS, *names)}
        row = [f"{t.median:.2f} ({ratios[name]:.1f}x)" if t else "-" for name, t in timings.items()]
        rows.append([" ".join(key), *row])
    return harness.table(["median ms (times ours)", OURS, *names], rows)


def mean_ratio(records: Sequence[Record], resolution: int, dtype: str, pass_: str, peer: str) -> float | None:
    """Geometric mean over a resolution, each layer as often as the model has it; None unless all are measured."""
    layers = {p.name: p.weight for p in peers.dinat_mini(resolution)}
    ratios = {
        r.problem["name"]: r.ratios[peer]
        for r in records
        if r.implementation == OURS and (r.dtype, r.pass_) == (dtype, pass_) and peer in r.ratios
    }
    if not layers.keys() <= ratios.keys():
        return None
    return harness.geometric_mean([ratios[name] for name in layers], list(layers.values()))


def summarize(records: Sequence[Record], names: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for resolution in RESOLUTIONS:
        for dtype in DTYPES:
            for pass_ in PASSES:
                means = {name: mean_ratio(records, resolution, dtype, pass_, name) for name in names}
                known = {name: round(mean, 3) for name, mean in means.items() if mean is not None}
                if known:
                    found.append({"resolution": resolution, "dtype": dtype, "pass": pass_, "ratios": known})
    return found


def judge(summary: Sequence[dict[str, Any]], memory: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every target with the value reached and whether that meets it; None where it was not measured."""
    verdicts = []
    for pass_, peer, target in TARGETS:
        key = (RESOLUTIONS[0], "float32", pass_)
        ratios = [s["ratios"] for s in summary if (s["resolution"], s["dtype"], s["pass"]) == key]
        value = ratios[0].get(peer) if ratios else None
        met = None if value is None else value >= target
        verdicts.append({"target": f"{pass_} at least {target:g}x {peer}", "value": value, "met": met})
    for pass_ in PASSES:
        value = next((m["over_q"] for m in memory if m["pass"] == pass_), None)
        met = None if value is None else value < MEMORY_TARGET
        name = f"{pass_} memory below {MEMORY_TARGET:g}x the query at {MEMORY_PROBLEM.name}"
        verdicts.append({"target": name, "value": value, "met": met})
    return verdicts


def print_report(
    records: Sequence[Record], names: Sequence[str], summary: Sequence[dict[str, Any]], verdicts: Sequence[dict]
) -> None:
    print(layer_table(records, names))
    for reason in sorted({f"{r.implementation}, {r.pass_}, {r.dtype}: {r.reason}" for r in records if r.reason}):
        print(f"- {reason}")
    if summary:
        print("\nGeometric means of time over ours, each layer as often as DiNAT-Mini has it")
        rows = [
            [f"{s['resolution']} {s['dtype']} {s['pass']}"]
            + [f"{s['ratios'][name]:.1f}x" if name in s["ratios"] else "-" for name in names]
            for s in summary
        ]
        print(harness.table(["", *names], rows))
    print("\nTargets (times: layers at 224, float32)")
    for verdict in verdicts:
        state = {True: "met", False: "MISSED", None: "not measured"}[verdict["met"]]
        value = "" if verdict["value"] is None else f"{verdict['value']:.2f}"
        print(f"  {verdict['target']:<60} {value:>7}  {state}")


def choose_layers(patterns: Sequence[str], batch: int) -> list[Problem]:
    layers = [layer for resolution in RESOLUTIONS for layer in peers.dinat_mini(resolution, batch)]
    if not patterns:
        return layers
    chosen = [layer for layer in layers if any(fnmatch(layer.name, f"*{pattern}*") for pattern in patterns)]
    if not chosen:
        names = ", ".join(layer.name for layer in layers)
        raise ValueError(f"no layer matches {' '.join(patterns)}; there are {names}")
    return chosen


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dinat_triton.bench.cpu", description="Times the CPU backend and its peers.")
    parser.add_argument("--out", type=Path, help="result file (default: bench/results/<device>/cpu.json)")
    parser.add_argument("--quick", action="store_true", help="two small stages in float32; writes only with --out")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help=f"of {', '.join(DTYPES)}")
    known = [peer.name for peer in peers.PEERS]
    parser.add_argument("--peers", nargs="*", default=known, metavar="PEER", help=f"of {', '.join(known)}")
    parser.add_argument("--layers", nargs="+", default=[], metavar="PATTERN", help="such as 224, 56x56 or 384/*-d1")
    parser.add_argument("--batch", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    parser.add_argument("--measure-memory", choices=PASSES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.threads < 1 or options.batch < 1:
        parser.error("--threads and --batch must be at least 1")
    options.dtypes = options.dtypes or (["float32"] if options.quick else list(DTYPES))
    try:
        options.peers = peers.find(options.peers)
        options.layers = choose_layers(options.layers or (QUICK_LAYERS if options.quick else ()), options.batch)
    except ValueError as error:
        parser.error(str(error))
    return options


def quiet() -> None:
    """Keeps the peers' warnings about missing GPUs and uncompiled calls out of the report."""
    warnings.filterwarnings("ignore", module=r"(torch|natten)\b")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def warn_if_busy() -> None:
    """Torch's threads wait for each other in a spin: one more busy process can make a short call 50 times as long."""
    load = harness.load_average()
    if load is not None and load > 0.5:
        print(f"The machine was busy in the last minute (load {load:.1f}): these times may mislead.", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    quiet()
    torch.set_num_threads(options.threads)
    if options.measure_memory:
        print(json.dumps(measure_memory(options.measure_memory)))
        return 0
    warn_if_busy()
    env = harness.environment("cpu")
    cells = [Cell(p, DTYPES[d], pass_) for p in options.layers for d in options.dtypes for pass_ in PASSES]
    names = [peer.name for peer in options.peers]
    progress = Progress(len(cells) + (not options.no_memory))
    records: list[Record] = []
    for cell in cells:
        progress.step(cell)
        records += measure_cell(cell, options.peers, QUICK_BUDGET if options.quick else BUDGET, progress)
    memory = []
    if not options.no_memory:
        progress.step("peak memory")
        memory = [peak_memory(pass_, options.threads) for pass_ in PASSES]
    progress.close()
    harness.add_ratios(records, OURS)
    summary = summarize(records, names)
    verdicts = judge(summary, memory)
    print_report(records, names, summary, verdicts)
    if options.out or not options.quick:
        path = options.out or harness.default_path("cpu", "cpu")
        harness.save(path, env, records, summary=summary, memory=memory, targets=verdicts)
        print(f"\nWrote {path.relative_to(harness.ROOT) if path.is_relative_to(harness.ROOT) else path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
