"""The `tiled` backend on the CPU, side by side with what else computes the layers of DiNAT-Mini there.

Every layer at 224 and 384, in float32 and bfloat16, forward and with its backward; the peak memory of a large map; and
the targets. A few minutes, most of them to compile FlexAttention.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dinat_triton.bench import compare, harness, ops
from dinat_triton.bench.ceilings import measure_ceilings
from dinat_triton.bench.harness import FORWARD, FORWARD_BACKWARD
from dinat_triton.bench.memory import EAGER_ALLOCATOR, in_fresh_process, resident_peak
from dinat_triton.bench.ops import Bench, Cell
from dinat_triton.bench.outputs import check_outputs
from dinat_triton.bench.peers import Inputs, Peer, Problem
from dinat_triton.bench.selection import check_names, find_layers, split

OURS = ops.OURS["cpu"]
DTYPES = ("float32", "bfloat16")
PASSES = (FORWARD, FORWARD_BACKWARD)
LAYERS = ("dinat_mini@224", "dinat_mini@384")
QUICK_LAYERS = ("dinat_mini@224:28x28*", "dinat_mini@224:7x7*")
QUICK_SECONDS = 0.15
TARGETS = ((FORWARD, "flex", 30.0), (FORWARD, "gather", 10.0), (FORWARD_BACKWARD, "gather", 10.0))
"""Least ratio of a peer's time to ours: geometric mean over the layers at 224, float32."""

MEMORY_LAYER = "dinat_mini@coco:200x304-d28"
MEMORY_TARGET = 12.0
"""Most bytes, beyond those of the inputs, as a multiple of the query's."""


def float32_only(peer: Peer) -> Peer:
    """Leaves out what would take too long."""
    reason = "compiled anew for every layer, so measured in float32 only; flex-tuned is measured everywhere"

    def obstacle(inputs: Inputs) -> str | None:
        return peer.obstacle(inputs) or (reason if inputs.query.dtype != torch.float32 else None)

    return replace(peer, obstacle=obstacle)


def memory_problem() -> Problem:
    ((model, layer),) = find_layers([MEMORY_LAYER])
    return ops.problem_of(model, layer, batch=1)


def peak_memory(pass_: str, threads: int) -> dict[str, Any]:
    """Of the memory layer, in a process of its own."""
    try:
        return in_fresh_process(measure_memory, EAGER_ALLOCATOR, pass_=pass_, threads=threads)
    except RuntimeError as error:
        return {"pass": pass_, "over_q": None, "reason": str(error)}


def measure_memory(pass_: str, threads: int) -> dict[str, Any]:
    """In the child. The first call also builds the plan, which stays cached; a later call finds it there."""
    torch.set_num_threads(threads)
    backward = pass_ == FORWARD_BACKWARD

    def run(problem: Problem, inputs: Inputs) -> None:
        with torch.set_grad_enabled(backward):
            ops.call_of(ops.prepare_ours(problem, inputs, OURS), pass_, inputs.grad_out)()

    problem = memory_problem()
    small = replace(problem, shape=(28, 28), dilation=(4, 4))
    run(small, Inputs.of(small, requires_grad=backward))
    inputs = Inputs.of(problem, requires_grad=backward)
    query_bytes = inputs.query.numel() * inputs.query.element_size()
    first, later = (resident_peak(lambda: run(problem, inputs)) for _ in range(2))
    return {
        "pass": pass_,
        "problem": problem.to_dict(),
        "dtype": "float32",
        "query_bytes": query_bytes,
        "first_call_bytes": first,
        "later_call_bytes": later,
        "over_q": round(max(first, later) / query_bytes, 3),
        "reason": None,
    }


def judge(summary: Sequence[dict[str, Any]], memory: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every target with the value reached and whether that meets it; None where it was not measured."""
    verdicts = []
    count = len(find_layers(LAYERS[:1]))
    for pass_, peer, target in TARGETS:
        value = next((s["ratios"].get(peer) for s in summary if is_target(s, pass_, peer, count)), None)
        met = None if value is None else value >= target
        verdicts.append({"target": f"{pass_} at least {target:g}x {peer}", "value": value, "met": met})
    for pass_ in PASSES:
        value = next((m["over_q"] for m in memory if m["pass"] == pass_), None)
        met = None if value is None else value < MEMORY_TARGET
        name = f"{pass_} memory below {MEMORY_TARGET:g}x the query at {memory_problem().label}"
        verdicts.append({"target": name, "value": value, "met": met})
    return verdicts


def is_target(mean: dict[str, Any], pass_: str, peer: str, count: int) -> bool:
    """Whether a mean is the one that a target speaks of, of all layers."""
    key = (mean["layers"], mean["batch"], mean["dtype"], mean["pass"])
    return key == (LAYERS[0], 1, "float32", pass_) and mean["measured"].get(peer) == count


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="result file (default: bench/results/<device>/cpu.json)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="two small stages in float32; writes only with --out")
    ops.add_peers(parser)
    parser.add_argument("--layers", nargs="+", metavar="LAYERS", help=f"(default: {' '.join(LAYERS)})")
    parser.add_argument("--dtype", nargs="+", metavar="DTYPE", help=f"of {', '.join(DTYPES)} (default: both)")
    parser.add_argument("--batch", type=int, default=1, help="images (default: 1)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    parser.add_argument("--strict", action="store_true",
                        help="exit with 1 if a target is missed, or if a peer's result differs from ours")  # fmt: skip
    compare.add_option(parser)


def find_cells(args: argparse.Namespace) -> list[Cell]:
    dtypes = split(args.dtype or (DTYPES[:1] if args.quick else DTYPES))
    check_names("dtype", dtypes, DTYPES)
    for name in ("batch", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    layers = find_layers(args.layers or (QUICK_LAYERS if args.quick else LAYERS))
    problems = [ops.problem_of(model, layer, args.batch) for model, layer in layers]
    return [Cell(problem, ops.DTYPES[dtype], pass_) for problem in problems for dtype in dtypes for pass_ in PASSES]


def run(args: argparse.Namespace) -> int:
    """Returns 1 if ours failed, or if that was asked for and a target is missed or a peer's result differs."""
    if args.compare:
        return compare.compare_files(*args.compare)
    device = torch.device("cpu")
    cells = find_cells(args)
    check_outputs(file=args.out)
    chosen = [float32_only(p) if p.name == "flex" else p for p in ops.find_peers(args.peers, device)]
    harness.prepare_process(args.threads)
    env = harness.environment(device)
    seconds = QUICK_SECONDS if args.quick else ops.SECONDS
    bench = Bench(device, OURS, measure_ceilings(device), seconds)
    records = ops.measure_all(bench, cells, [ops.ours(OURS), *chosen])
    threads = torch.get_num_threads()
    memory = [] if args.no_memory else [peak_memory(pass_, threads) for pass_ in PASSES]
    verdicts = judge(ops.summarize(records, OURS), memory)
    print(ops.report(records, OURS) + "\n\nTargets (times: layers at 224, float32)")
    print("\n".join(harness.verdict_line(v) for v in verdicts))
    if args.out or not args.quick:
        path = args.out or harness.default_path(device, "cpu")
        ops.save(path, env, records, bench, memory=memory, targets=verdicts)
        print(f"\nWrote {harness.shown(path)}")
    missed = args.strict and any(v["met"] is False for v in verdicts)
    return ops.verdict(records, OURS, args.strict) or int(missed)
