"""What the first call of a layer takes: its plan, its compilation, its launches. Each in a process of its own, with no
compiled kernel to be found."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dinat_triton.bench import compare, harness, ops
from dinat_triton.bench.harness import BACKWARD, FORWARD, Record, Timing
from dinat_triton.bench.memory import in_fresh_process
from dinat_triton.bench.ops import DEFAULT_DTYPE, DTYPES, OURS, first_line
from dinat_triton.bench.outputs import check_outputs
from dinat_triton.bench.peers import Inputs, Problem
from dinat_triton.bench.selection import LAYERS_HELP, find_device, find_layers
from dinat_triton.progress import ProgressBar

TARGET_MS = 2000.0


def measure_layer(problem: Problem, device: torch.device) -> list[Record]:
    """First calls of one layer, with an empty cache of Triton's."""
    dtype, backend = DEFAULT_DTYPE[device.type], OURS[device.type]
    record = partial(Record, problem.to_dict(), backend, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = in_fresh_process(
                first_calls, {"TRITON_CACHE_DIR": folder}, problem=problem.to_dict(), device=str(device), dtype=dtype,
                backend=backend,
            )  # fmt: skip
        except RuntimeError as error:
            return [record(pass_=FORWARD, reason=first_line(error))]
    return [
        record(pass_=pass_, timing=Timing(first, first, first, 1), also={"second_call_ms": second})
        for pass_, (first, second) in found.items()
    ]


def first_calls(problem: dict[str, Any], device: str, dtype: str, backend: str) -> dict[str, tuple[float, float]]:
    """In the child: milliseconds of the first and of the second forward and backward.

    What a process pays once, whatever it calls, is paid before: the device, the driver, the import.
    """
    layer = Problem.from_dict(problem)
    inputs = Inputs.of(layer, DTYPES[dtype], device, requires_grad=True)
    synchronize = torch.cuda.synchronize if inputs.query.is_cuda else lambda: None
    if backend == "triton":
        from dinat_triton.kernels.configs import architecture_of

        architecture_of(inputs.query.device)
    attend = ops.prepare_ours(layer, inputs, backend)
    forward = partial(timed, ops.call_of(attend, FORWARD, inputs.grad_out), synchronize)
    forwards = (forward(), forward())
    backward = partial(timed, ops.call_of(attend, BACKWARD, inputs.grad_out), synchronize)
    return {FORWARD: forwards, BACKWARD: (backward(), backward())}


def timed(call: Callable[[], object], synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return round(1e3 * (time.perf_counter() - start), 3)


def report(records: Sequence[Record]) -> str:
    rows = [
        [r.title, harness.milliseconds(r.timing.median), harness.milliseconds(r.also["second_call_ms"])]
        for r in records
        if r.timing
    ]
    return "\n".join([harness.table(["ms", "first call", "second"], rows), *ops.reasons(records)])


def judge(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The longest first call of each pass against the target."""
    verdicts = []
    for pass_ in (FORWARD, BACKWARD):
        times = [r.timing.median for r in records if r.timing and r.pass_ == pass_]
        if times:
            name = f"first {pass_} within {TARGET_MS:g} ms, of all layers"
            verdicts.append({"target": name, "value": max(times), "met": max(times) <= TARGET_MS})
    return verdicts


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", nargs="+", default=["dinat_mini@224"], metavar="LAYERS",
                        help=f"{LAYERS_HELP} (default: dinat_mini@224)")  # fmt: skip
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--batch", type=int, default=1, help="images (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the results")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    compare.add_option(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 1 if a call failed, or if that was asked for and a target is missed."""
    if args.compare:
        return compare.compare_files(*args.compare)
    for name in ("batch", "jobs"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    device = find_device(args.device)
    check_outputs(file=args.out)
    problems = [ops.problem_of(model, layer, args.batch) for model, layer in find_layers(args.layers)]
    env = harness.environment(device)
    progress = ProgressBar(len(problems))
    records: list[Record] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for found in pool.map(partial(measure_layer, device=device), problems):
            records += found
            progress.step(found[0].title)
    progress.close()
    verdicts = judge(records)
    print(report(records) + "\n\n" + "\n".join(harness.verdict_line(v) for v in verdicts))
    if args.out is not None:
        harness.save(args.out, env, records, targets=verdicts)
        print(f"\nWrote {harness.shown(args.out)}")
    failed = any(record.reason for record in records)
    return 1 if failed or (args.strict and not all(v["met"] for v in verdicts)) else 0
