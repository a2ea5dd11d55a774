"""Shares of a model's parts in the time of its step: `dinat-triton bench profile`.

A named scope is opened around the forward of each part of a model while torch's profiler runs. A forward operation
belongs to the innermost scope around it, an operation of the backward to the scope of the forward operation with its
sequence number, whose gradient it is.

What counts is the time of kernels: the device's on a GPU, on a CPU that of torch's operations. A step is timed on its
own, by turns with the profiled ones. What no kernel accounts for is *overhead*: on a CPU Python and autograd's engine,
on a GPU the time that it idles. Patch embedding and downsampling are *convolution*, norms included;
what stands outside of modules is *other*, such as residual additions, the loss, and Swin's rolls and window copies.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from dinat_triton.bench import harness
from dinat_triton.bench.harness import Record, Results, Timing
from dinat_triton.bench.models import BATCH, INFERENCE, TRAINING, check_models, model_of, step_of
from dinat_triton.commands.options import check_positive, find_device
from dinat_triton.commands.tables import milliseconds, table

ATTENTION, LINEAR, NORM, CONVOLUTION, ACTIVATION = "attention", "linear", "norm", "convolution", "activation"
OPTIMIZER, OTHER, OVERHEAD = "optimizer", "other", "overhead"
PARTS = (ATTENTION, LINEAR, CONVOLUTION, NORM, ACTIVATION, OTHER, OPTIMIZER, OVERHEAD)
MODELS = ("dinat_mini", "swin_tiny_patch4_window7_224")
RESAMPLING = ("patch_embed", "downsample", "stem")
SCOPE = "part: "
WARMUPS = 2


def record_of(
    problem: dict[str, Any], names: tuple[str, str, str], steps: Sequence[float], profiled: Sequence[dict[str, float]]
) -> Record:
    """Medians of steps and of their parts; on a busy machine the parts are scaled to fit the step."""
    parts = {part: median(found[part] for found in profiled) for part in PARTS}
    step = median(steps)
    scale = min(1.0, step / sum(parts.values()))
    parts = {part: round(scale * each, 4) for part, each in parts.items()}
    parts[OVERHEAD] = max(0.0, round(step - sum(parts.values()), 4))
    return Record(problem, *names, Timing.of(steps), also={"parts_ms": parts})


def shares(record: Record) -> dict[str, float]:
    """Each part over the whole step."""
    parts = record.also["parts_ms"]
    return {part: ms / sum(parts.values()) for part, ms in parts.items()}


# Scopes


def part_of(name: str, module: nn.Module) -> str | None:
    """The part that a module is, by its name in its parent and its class; None for those that only hold others."""
    kind = type(module).__name__
    if any(word in name for word in RESAMPLING) and not isinstance(module, nn.Identity):
        return CONVOLUTION
    if "Attention" in kind:
        return ATTENTION
    if "Norm" in kind:
        return NORM
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return LINEAR if isinstance(module, nn.Linear) else CONVOLUTION
    is_activation = type(module).__module__.endswith(("activation", "activations"))
    return ACTIVATION if is_activation and not isinstance(module, nn.Softmax) else None


def parts_of(module: nn.Module, name: str = "") -> Iterator[tuple[nn.Module, str]]:
    """Modules that get a scope. Within a downsampling nothing else does."""
    part = part_of(name, module)
    if part is not None:
        yield module, part
    if part != CONVOLUTION:
        for child_name, child in module.named_children():
            yield from parts_of(child, child_name)


@contextmanager
def scoped(model: nn.Module) -> Iterator[None]:
    """Opens a scope around every part of the model."""
    with ExitStack() as stack:
        for module, part in parts_of(model):
            module.forward = record_function(SCOPE + part)(module.forward)
            stack.callback(delattr, module, "forward")
        yield


# Attribution


def times_of_parts(events: Iterable[FunctionEvent], on_gpu: bool) -> dict[str, float]:
    """Milliseconds of kernels in each part."""
    roots = [event for event in events if event.device_type == DeviceType.CPU and event.cpu_parent is None]
    owners: dict[tuple[int, int], str] = {}
    found = dict.fromkeys(PARTS, 0.0)
    for root in sorted(roots, key=lambda event: event.time_range.start):
        for event, part in attributed(root, OTHER, owners):
            found[part] += kernel_time(event, on_gpu) / 1e3
    return found


def attributed(
    event: FunctionEvent, part: str, owners: dict[tuple[int, int], str]
) -> Iterator[tuple[FunctionEvent, str]]:
    """An event and all within it, each with its part; `owners` keeps whose gradient an operation will have."""
    if event.name.startswith(SCOPE):
        part = event.name.removeprefix(SCOPE)
    elif event.name.startswith("Optimizer."):
        part = OPTIMIZER
    elif event.name.startswith("autograd::engine::evaluate_function"):
        part = owners.get((event.fwd_thread or event.thread, event.sequence_nr), OTHER)
    elif event.sequence_nr >= 0:
        # Operations that need no gradient are given the number too; the one that takes it comes last.
        owners[event.thread, event.sequence_nr] = part
    yield event, part
    for child in event.cpu_children:
        yield from attributed(child, part, owners)


def kernel_time(event: FunctionEvent, on_gpu: bool) -> float:
    """Microseconds of kernels that an event launched itself, or on a CPU of an operation but for those within it."""
    if on_gpu:
        return sum(kernel.duration for kernel in event.kernels if kernel.name != event.name)  # no copy of a scope
    return max(0.0, event.self_cpu_time_total) if event.name.startswith("aten::") else 0.0


# Measuring


def measure(name: str, pass_: str, batch: int, device: torch.device, repeats: int) -> Record:
    """Profiles a model with random weights; in bfloat16 autocast on a GPU."""
    (model, images), on_gpu = model_of(name, pass_, batch, str(device)), device.type == "cuda"
    found = samples(model, step_of(model, images, pass_, autocast=on_gpu), on_gpu, repeats)
    return record_of({"batch": batch}, (name, pass_, "bfloat16" if on_gpu else "float32"), *found)


def samples(
    model: nn.Module, step: Callable[[], object], on_gpu: bool, repeats: int
) -> tuple[list[float], list[dict[str, float]]]:
    """Milliseconds of steps, and of the parts of as many others under the profiler, by turns."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    steps, profiled = [], []
    for turn in range(WARMUPS + repeats):
        steps.append(harness.elapsed_ms(step, "cuda" if on_gpu else "cpu"))
        if turn >= WARMUPS:
            with scoped(model), profile(activities=activities, acc_events=True) as profiler:
                harness.elapsed_ms(step, "cuda" if on_gpu else "cpu")
            profiled.append(times_of_parts(profiler.events(), on_gpu))
    return steps[WARMUPS:], profiled


# The command


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL",
                        help=f"models of timm, ours among them (default: {' '.join(MODELS)})")  # fmt: skip
    parser.add_argument("--batch", type=int, metavar="N", help="images (default: 1 on a CPU, 64 on a GPU)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--train", action="store_true", help="a training step instead of an inference")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="profiled steps (default: 5)")


def run(args: argparse.Namespace) -> Results:
    check_positive(args, "batch", "repeats")
    check_models(args.models)
    device = find_device(args.device)
    environment = harness.environment(device)
    pass_, batch = TRAINING if args.train else INFERENCE, args.batch or BATCH[device.type]
    names = tqdm(args.models, "models", disable=None)
    return Results("profile", environment, [measure(name, pass_, batch, device, args.repeats) for name in names])


def report(results: Results) -> str:
    first, parts = results.records[0], parts_in(results.records)
    header = [f"{first.pass_}, batch {first.problem['batch']}, {first.dtype}", "ms", *parts]
    rows = [
        [record.implementation, milliseconds(record.timing.median), *(f"{shares(record)[part]:.1%}" for part in parts)]
        for record in results.records
        if record.timing
    ]
    return table(header, rows)


def parts_in(records: Sequence[Record]) -> list[str]:
    """The parts that any of them has."""
    return [part for part in PARTS if any(record.also["parts_ms"][part] > 0 for record in records)]
