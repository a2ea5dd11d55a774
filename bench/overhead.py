"""Microseconds of Python in a call of the `triton` backend, before anything is launched; on any machine.

Kernels are stand-ins that do nothing, on tensors of the CPU. What remains is ours: `na2d` with its checks, the op with
dispatch and autograd, the host code with its look-ups and new tensors.

`--new-sizes` times what a detector pays when an image comes in a size that it has not seen: plans, index arrays and
launches of all its layers, forward and backward. Compiling is not counted: sizes share their kernels.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from dinat_triton.bench import harness
from dinat_triton.bench.harness import Record, Results, Timing
from dinat_triton.bench.layers import prepare_ours
from dinat_triton.bench.peers import Inputs
from dinat_triton.commands.options import LAYERS_HELP, check_positive, find_device, find_layers
from dinat_triton.commands.tables import table
from dinat_triton.layers import Layer
from dinat_triton.tuner.layer_run import LayerRun
from dinat_triton.work import BACKWARD, FORWARD, FORWARD_BACKWARD

if TYPE_CHECKING:
    from dinat_triton.kernels.configs import Preset

# Layers of one launch each way, and of tables and several passes.
LAYERS = ("dinat_mini@224:14x14*",)
DTYPE = torch.bfloat16
# A forward that autograd records, to go back through it.
RECORDED = "recorded forward"
# The whole call, what is ours below torch's dispatcher, and the whole call with real launches.
NA2D, HOST, LAUNCHED = "na2d", "host", "launched"
NEW, SEEN = "new size", "seen before"
# Plans for sm_90, whose GPUs are the fastest, and wait the longest.
ARCH, BACKBONE = "sm_90", "dinat_mini@coco"
IMAGE = (800, 1216)  # of which the backbone's maps are
IMAGE_SIDES = range(480, 1345, 32)

Calls = dict[str, Callable[[], object]]


class Nothing:
    """A stand-in for a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *_: object) -> None:
        return None

    def run(self, *_: object) -> None:
        return None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.run


class AnyKernel(dict):
    """Triton's cache of compiled kernels, as if every one were in it."""

    def get(self, key: object, default: object = None) -> Nothing:
        return Nothing()


@contextmanager
def nothing_launched() -> Iterator[None]:
    """Lets the backend run up to its launches, with tensors of the CPU. Meant for a process of its own."""
    import triton

    from dinat_triton.offline.inspect import KERNELS, pretending
    from dinat_triton.offline.targets import find_target

    with pretending(find_target(ARCH)), triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True  # or else tensors of the CPU would be refused
        device = triton.runtime.driver.active.get_current_device()
        for kernel in KERNELS.values():
            kernel.device_caches[device] = (AnyKernel(), *kernel.create_binder()[1:])
        try:
            yield
        finally:
            for kernel in KERNELS.values():
                del kernel.device_caches[device]


def host_run(layer: Layer, device: torch.device, preset: Preset | None = None) -> LayerRun:
    """The host code alone, below torch's dispatcher."""
    from dinat_triton.kernels import attention

    return LayerRun(layer, DTYPE, device, attention, lambda _: {"preset": preset})


def calls_of(layer: Layer, inputs: Inputs) -> tuple[Calls, Calls]:
    """The calls of each level, forward and backward."""
    na2d = prepare_ours(layer, inputs, "triton").call
    run = host_run(layer, inputs.query.device)
    out, saved = na2d(), run.forward(None)
    backward: Calls = {
        NA2D: lambda: torch.autograd.grad(out, inputs.leaves, inputs.grad_out, retain_graph=True),
        HOST: lambda: run.backward(None, saved),
    }
    return {NA2D: na2d, HOST: lambda: run.forward(None)}, backward


def layer_records(layer: Layer, seconds: float) -> list[Record]:
    """Every level of code, forward and backward; with a GPU the host's time of real launches too."""
    with nothing_launched():
        found = times_of(calls_of(layer, Inputs.of(layer, DTYPE, requires_grad=True)), seconds)
    if torch.cuda.is_available():
        forward, backward = calls_of(layer, Inputs.of(layer, DTYPE, "cuda", requires_grad=True))
        found |= times_of(({LAUNCHED: forward[NA2D]}, {LAUNCHED: backward[NA2D]}), seconds)
    return [Record(asdict(layer), level, pass_, "bfloat16", timing) for (pass_, level), timing in found.items()]


def times_of(calls: tuple[Calls, Calls], seconds: float) -> dict[tuple[str, str], Timing]:
    """By pass and level. A GPU is never waited for: it works the launches off meanwhile."""
    forward, backward = calls
    with torch.no_grad():
        found = {(FORWARD, level): timed(call, seconds) for level, call in forward.items()}
    found |= {(RECORDED, level): timed(call, seconds) for level, call in forward.items()}
    return found | {(BACKWARD, level): timed(call, seconds) for level, call in backward.items()}


def timed(call: Callable[[], object], seconds: float) -> Timing:
    from torch.utils.benchmark import Timer

    timer = Timer("call()", globals={"call": call}, timer=time.perf_counter, num_threads=torch.get_num_threads())
    return Timing.of([1e3 * each for each in timer.blocked_autorange(min_run_time=seconds).times])


# New image sizes


def size_records(count: int) -> list[Record]:
    """All distinct layers of a detection backbone on images of random new sizes, and on the same sizes again."""
    sizes = random.Random(0).sample([(h, w) for h in IMAGE_SIDES for w in IMAGE_SIDES], count)
    found: dict[str, list[float]] = {NEW: [], SEEN: []}
    with nothing_launched():
        step_of(IMAGE)()  # what the first call of a process takes is no matter of its size
        for size in tqdm(sizes, "sizes", disable=None):
            for times in found.values():
                times.append(harness.elapsed_ms(step_of(size)))
    problem: dict[str, Any] = {"layers": BACKBONE, "arch": ARCH, "sizes": count}
    return [Record(problem, name, FORWARD_BACKWARD, "bfloat16", Timing.of(times)) for name, times in found.items()]


def step_of(image: tuple[int, int]) -> Callable[[], None]:
    """Forward and backward of every distinct layer of the backbone, up to the launches."""
    from dinat_triton.kernels.configs import Preset
    from dinat_triton.offline.targets import find_target

    preset = Preset(find_target(ARCH).architecture)
    runs = []
    for layer in find_layers([BACKBONE]):
        stride = IMAGE[0] // layer.shape[0]
        spans = [k * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        shape = tuple(max(ceil(side / stride), span) for side, span in zip(image, spans, strict=True))
        runs.append(host_run(replace(layer, shape=shape), torch.device("cpu"), preset))

    def step() -> None:
        for run in runs:
            run.backward(None, run.forward(None))

    return step


# The command


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), metavar="LAYERS",
                        help=f"{LAYERS_HELP} (default: {' '.join(LAYERS)})")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=1.0, help="for each level (default: 1)")
    parser.add_argument("--new-sizes", type=int, metavar="N", help=f"instead, all layers of {BACKBONE} on images of N "
                        "new sizes")  # fmt: skip


def run(args: argparse.Namespace) -> Results:
    import triton

    check_positive(args, "seconds", "new_sizes")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("the kernels are interpreted, so there is no launch to stop at: unset TRITON_INTERPRET")
    layers, environment = find_layers(args.layers), harness.environment(find_device(None))
    if args.new_sizes:
        return Results("overhead", environment, size_records(args.new_sizes))
    return Results("overhead", environment, [r for layer in layers for r in layer_records(layer, args.seconds)])


def report(results: Results) -> str:
    """Microseconds of whole calls, and of the levels of code within them."""
    cells: dict[str, dict[str, float]] = {}
    for r in results.records:
        if r.timing:
            cells.setdefault(r.title, {})[r.implementation] = 1e3 * r.timing.median
    names = dict.fromkeys(name for us in cells.values() for name in us)
    rows = [[title, *(f"{us[name]:.1f}" if name in us else "-" for name in names)] for title, us in cells.items()]
    return table(["us, in the median", *names], rows)
