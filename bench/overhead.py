"""Microseconds of Python in a call of the Triton backend, before anything is launched; on any machine.

Triton is stopped where it would launch, so what remains is ours: `na2d` with its checks, the op with dispatch and
autograd, and the kernels' host code with its look-ups and new tensors. Triton's own launcher comes on top of that, and
is in `launched`, which needs a GPU. Without one the tensors are a CPU's, and the kernels are told that it is all right.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dinat_triton import functional, modules, ops
from dinat_triton.bench import compare, harness
from dinat_triton.bench.harness import BACKWARD, FORWARD, Record, Timing
from dinat_triton.bench.ops import problem_of
from dinat_triton.bench.outputs import check_outputs
from dinat_triton.bench.peers import Inputs, Problem
from dinat_triton.bench.selection import LAYERS_HELP, find_device, find_layers
from dinat_triton.layers import Layer

# A layer of one launch each way, and one that launches tables and several passes.
LAYERS = ("dinat_mini@224:14x14*",)
DTYPE = torch.bfloat16
TARGET_US = 15.0
SECONDS = 1.0
# A forward that autograd records, to go back through it.
RECORDED = "recorded forward"
# From the outermost: each holds those behind it.
NA2D, MODULE, OP, LAUNCH, LAUNCHED = "na2d", "module", "op", "launch", "launched"


@contextmanager
def nothing_launched() -> Iterator[None]:
    """Lets the backend run up to its launches, with tensors of any device."""
    import triton
    from triton.runtime import JITFunction

    if triton.knobs.runtime.interpret:
        raise RuntimeError("the kernels are interpreted, so there is no launch to stop at: unset TRITON_INTERPRET")
    from dinat_triton.kernels import prepare

    class Compiled:
        """Stands in for a compiled kernel."""

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args: None

    with triton.knobs.runtime.scope(), mock.patch.object(JITFunction, "run", return_value=Compiled()):
        triton.knobs.runtime.interpret = True
        prepare.forget()
        try:
            yield
        finally:
            prepare.forget()


def measure_layer(model: str, layer: Layer, device: torch.device, seconds: float) -> list[Record]:
    """Every level of code, forward and backward, taking turns."""
    problem = problem_of(model, layer, batch=1)
    inputs = Inputs.of(problem, DTYPE, device, requires_grad=True)
    with nothing_launched():
        forward, backward = calls_of(problem, inputs)
        with torch.no_grad():
            found = {FORWARD: harness.measure(forward, budget=seconds)}
        found[RECORDED] = harness.measure(forward, budget=seconds)
        found[BACKWARD] = harness.measure(backward, budget=seconds)
    if device.type == "cuda":
        for pass_, timing in launched(problem, inputs, seconds).items():
            found[pass_][LAUNCHED] = timing
    return [
        Record(problem.to_dict(), name, pass_, "bfloat16", timing=timing)
        for pass_, timings in found.items()
        for name, timing in timings.items()
    ]


Calls = dict[str, Callable[[], object]]


def calls_of(problem: Problem, inputs: Inputs) -> tuple[Calls, Calls]:
    """The calls of each level, forward and backward."""
    from dinat_triton.kernels import attention

    window = functional.window_of(len(problem.shape), problem.kernel_size, 1, problem.dilation, False)
    qkv = [inputs.query, inputs.key, inputs.value]
    packed = torch.stack(qkv, dim=-3).detach().requires_grad_()

    def na2d() -> Tensor:
        return public(problem, inputs)

    def module() -> Tensor:
        return modules.attend(packed, window, inputs.rpb, None, 0.0)

    with recorded(attention, "forward") as of_forward, recorded(attention, "backward") as of_backward:
        out, from_packed = na2d(), module()
        torch.autograd.grad(out, inputs.leaves, inputs.grad_out, retain_graph=True)
    forward: Calls = {
        NA2D: na2d,
        MODULE: module,
        OP: lambda: ops.na(qkv, window, inputs.rpb, None, 0.0, False, "triton"),
        LAUNCH: lambda: attention.forward(*of_forward[0]),
    }
    leaves = (packed, inputs.rpb)
    backward: Calls = {
        NA2D: lambda: torch.autograd.grad(out, inputs.leaves, inputs.grad_out, retain_graph=True),
        MODULE: lambda: torch.autograd.grad(from_packed, leaves, inputs.grad_out, retain_graph=True),
        LAUNCH: lambda: attention.backward(*of_backward[0]),
    }
    return forward, backward


def public(problem: Problem, inputs: Inputs) -> Tensor:
    options: dict[str, Any] = {"dilation": problem.dilation, "rpb": inputs.rpb, "backend": "triton"}
    return functional.na2d(inputs.query, inputs.key, inputs.value, problem.kernel_size, **options)


@contextmanager
def recorded(module: Any, name: str) -> Iterator[list[tuple]]:
    """Collects the arguments that a function of a module is called with."""
    function, found = getattr(module, name), []

    def record(*arguments: Any) -> Any:
        found.append(arguments)
        return function(*arguments)

    with mock.patch.object(module, name, record):
        yield found


def launched(problem: Problem, inputs: Inputs, seconds: float) -> dict[str, Timing]:
    """The host's time with launches, which the GPU works off meanwhile."""

    def forward() -> Tensor:
        with torch.no_grad():
            return public(problem, inputs)

    out = public(problem, inputs)

    def backward() -> object:
        return torch.autograd.grad(out, inputs.leaves, inputs.grad_out, retain_graph=True)

    for call in (forward, backward):
        call()
    torch.cuda.synchronize()
    return harness.measure({FORWARD: forward, BACKWARD: backward}, budget=seconds)


# What was found


def report(records: Sequence[Record]) -> str:
    """Microseconds of whole calls, and how they divide among the layers of code."""
    cells: dict[tuple[str, str, str], dict[str, float]] = {}
    titles = {r.cell: r.title for r in records}
    for r in records:
        if r.timing:
            cells.setdefault(r.cell, {})[r.implementation] = 1e3 * r.timing.median
    rows = [[titles[key], *(f"{us:.1f}" if us is not None else "-" for us in split_up(us_of))]
            for key, us_of in cells.items()]  # fmt: skip
    header = ["us", NA2D, MODULE, "= functional", "+ op", "+ launch", LAUNCHED]
    return harness.table(header, rows)


def split_up(us: dict[str, float]) -> list[float | None]:
    """Whole calls, then na2d's share of each layer of code; in a backward functional has none."""
    op = us.get(OP, us[NA2D])
    return [us[NA2D], us[MODULE], us[NA2D] - op, op - us[LAUNCH], us[LAUNCH], us.get(LAUNCHED)]


def judge(records: Sequence[Record]) -> list[dict[str, Any]]:
    verdicts = []
    for r in records:
        if r.implementation in (NA2D, MODULE) and r.timing:
            us = 1e3 * r.timing.median
            name = f"{r.implementation} {r.pass_} at most {TARGET_US:g} us: {r.problem['name']}"
            verdicts.append({"target": name, "value": round(us, 2), "met": us <= TARGET_US})
    return verdicts


# The command


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), metavar="LAYERS",
                        help=f"{LAYERS_HELP} (default: {' '.join(LAYERS)})")  # fmt: skip
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each level (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the results")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    compare.add_option(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 1 if that was asked for and a target is missed."""
    if args.compare:
        return compare.compare_files(*args.compare)
    if args.seconds <= 0:
        raise ValueError(f"--seconds must be positive, got {args.seconds}")
    device, layers = find_device(args.device), find_layers(args.layers)
    check_outputs(file=args.out)
    harness.prepare_process()
    env = harness.environment(device)
    records = [r for model, layer in layers for r in measure_layer(model, layer, device, args.seconds)]
    verdicts = judge(records)
    print(report(records) + "\n\n" + "\n".join(harness.verdict_line(v) for v in verdicts))
    if args.out is not None:
        harness.save(args.out, env, records, targets=verdicts)
        print(f"\nWrote {harness.shown(args.out)}")
    return int(args.strict and not all(v["met"] for v in verdicts))
