"""Where a model's step spends its time: `dinat-triton bench profile`.

Hooks on a model's modules open a named scope around each part while torch's profiler runs. A forward operation belongs
to the innermost scope around it. An operation of the backward belongs where the forward operation does that it is the
gradient of: autograd gives both the same sequence number. So both passes are attributed alike, whatever the operations
are called.

What counts is the time of kernels: on a GPU that of the device's kernels, on a CPU that of torch's operations, each
without those that it calls, and without views. A step's time is measured on its own, by turns with the profiled steps,
without hooks and profiler. What no kernel accounts for is *overhead*: on a CPU Python, views and autograd's engine; on
a GPU the time that it idles.

The parts are those of modules: Swin's rolls and window copies stand outside its attention module and are *other*, as
are residual additions, the loss and the pooling. Patch embedding and downsampling count as *convolution*, norms and
projections in them included.
"""

from __future__ import annotations

import argparse
import difflib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import median, median_low
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from dinat_triton.bench import harness
from dinat_triton.bench.harness import Record, Timing
from dinat_triton.bench.models import BATCH, INFERENCE, TRAINING, step_of
from dinat_triton.bench.outputs import check_outputs
from dinat_triton.bench.selection import find_device
from dinat_triton.progress import ProgressBar

ATTENTION, LINEAR, NORM, CONVOLUTION, ACTIVATION = "attention", "linear", "norm", "convolution", "activation"
OPTIMIZER, OTHER, OVERHEAD = "optimizer", "other", "overhead"
PARTS = (ATTENTION, LINEAR, CONVOLUTION, NORM, ACTIVATION, OTHER, OPTIMIZER, OVERHEAD)
MODELS = ("dinat_mini", "swin_tiny_patch4_window7_224")
RESAMPLING = ("patch_embed", "downsample", "stem")
SCOPE = "part: "
# Namespaces of what is not an operation: the engine's own events, and operations that are written in Python.
NOT_KERNELS = ("autograd", "torch", "dinat_triton")
WARMUPS = 2


@dataclass(frozen=True)
class Profile:
    """A step's seconds, part by part; they add up to `seconds`."""

    model: str
    pass_: str
    batch: int
    dtype: str
    parts: dict[str, float]
    operations: int
    timing: Timing

    @classmethod
    def measured(
        cls, model: str, pass_: str, batch: int, dtype: str, seconds: Sequence[float], tallies: Sequence[Tally]
    ) -> Profile:
        """Medians. Kernels that took longer than the steps, as on a busy machine, are scaled to fit them."""
        step = median(seconds)
        parts = {part: median(tally.parts[part] for tally in tallies) for part in PARTS}
        scale = min(1.0, step / sum(parts.values()))
        parts = {part: scale * each for part, each in parts.items()}
        parts[OVERHEAD] += max(0.0, step - sum(parts.values()))  # what scaling leaves may round below zero
        timing = Timing.of([1e3 * each for each in seconds])
        return cls(model, pass_, batch, dtype, parts, median_low(tally.operations for tally in tallies), timing)

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def shares(self) -> dict[str, float]:
        return {part: seconds / self.seconds for part, seconds in self.parts.items()}

    def record(self) -> Record:
        parts = {part: round(1e3 * seconds, 4) for part, seconds in self.parts.items()}
        return Record({"batch": self.batch}, self.model, self.pass_, self.dtype, self.timing,
                      also={"parts_ms": parts, "operations": self.operations})  # fmt: skip

    @classmethod
    def of(cls, record: Record) -> Profile:
        parts = {part: ms / 1e3 for part, ms in record.also["parts_ms"].items()}
        assert record.timing is not None
        names = record.implementation, record.pass_, record.problem["batch"], record.dtype
        return cls(*names, parts, record.also["operations"], record.timing)


# Scopes


def part_of(name: str, module: nn.Module) -> str | None:
    """The part that a module is, by its name in its parent and its class; None for those that only hold others."""
    kind = type(module).__name__
    if any(word in name for word in RESAMPLING) and not isinstance(module, nn.Identity):
        return CONVOLUTION
    if "Attention" in kind:
        return ATTENTION
    if isinstance(module, nn.Linear):
        return LINEAR
    if "Norm" in kind:
        return NORM
    if isinstance(module, nn.modules.conv._ConvNd):
        return CONVOLUTION
    if type(module).__module__.endswith("activation") or type(module).__module__.endswith("activations"):
        return None if isinstance(module, nn.Softmax) else ACTIVATION
    return None


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
            enter, leave = hooks(part)
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


def hooks(part: str) -> tuple[Callable[..., None], Callable[..., None]]:
    scopes: list[record_function] = []

    def enter(*_: object) -> None:
        scopes.append(record_function(SCOPE + part))
        scopes[-1].__enter__()

    def leave(*_: object) -> None:
        scopes.pop().__exit__(None, None, None)

    return enter, leave


# Attribution


@dataclass
class Tally:
    """Seconds of kernels in each part, and how many there were."""

    parts: dict[str, float]
    operations: int = 0

    @classmethod
    def of(cls, events: Iterable[FunctionEvent], on_gpu: bool) -> Tally:
        roots = [event for event in events if event.device_type == DeviceType.CPU and event.cpu_parent is None]
        owners: dict[tuple[int, int], str] = {}
        found = cls(dict.fromkeys(PARTS, 0.0))
        for root in sorted(roots, key=lambda event: event.time_range.start):
            for event, part in attributed(root, OTHER, owners):
                kernels = gpu_kernels(event) if on_gpu else cpu_kernels(event)
                found.parts[part] += sum(kernels) / 1e6
                found.operations += len(kernels)
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


def cpu_kernels(event: FunctionEvent) -> list[float]:
    """Microseconds of an operation of torch, but for those within it; nothing of views and of other events."""
    namespace, _, name = event.name.partition("::")
    if not name or namespace in NOT_KERNELS or is_view(event.name):
        return []
    return [max(0.0, event.self_cpu_time_total)]


@lru_cache(maxsize=1024)
def is_view(name: str) -> bool:
    """Whether an operation returns its argument, looked at in another way; by its schema."""
    schemas = torch._C._jit_get_schemas_for_operator(name)
    results = [result.alias_info for schema in schemas[:1] for result in schema.returns]
    return any(alias is not None and not alias.is_write for alias in results)


def gpu_kernels(event: FunctionEvent) -> list[float]:
    """Microseconds of the device's kernels that an event launched itself; a scope's own copy there is none."""
    return [kernel.duration for kernel in event.kernels if kernel.name != event.name]


# Measuring


def measure(name: str, pass_: str, batch: int, device: torch.device, repeats: int, tick: Callable[[], None]) -> Profile:
    """Profiles a model with random weights; in bfloat16 autocast on a GPU."""
    import timm

    import dinat_triton  # noqa: F401  (registers the models)

    torch.manual_seed(0)
    model: Any = timm.create_model(name, device=device).train(pass_ == TRAINING)
    images = torch.randn(batch, *model.default_cfg["input_size"], device=device)
    on_gpu = device.type == "cuda"
    step = step_of(model, images, pass_, autocast=on_gpu)
    dtype = "bfloat16" if on_gpu else "float32"
    return Profile.measured(name, pass_, batch, dtype, *samples(model, step, on_gpu, repeats, tick))


def samples(
    model: nn.Module, step: Callable[[], object], on_gpu: bool, repeats: int, tick: Callable[[], None]
) -> tuple[list[float], list[Tally]]:
    """Seconds of steps, and the kernels of as many others under the profiler, by turns."""
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    seconds, tallies = [], []
    for turn in range(WARMUPS + repeats):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - start)
        if turn >= WARMUPS:
            with scoped(model), profile(activities=activities, acc_events=True) as profiler:
                step()
                synchronize()
            tallies.append(Tally.of(profiler.events(), on_gpu))
        tick()
    return seconds[WARMUPS:], tallies


# The command


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", default=list(MODELS), metavar="MODEL",
                        help=f"models of timm, ours among them (default: {' '.join(MODELS)})")  # fmt: skip
    parser.add_argument("--batch", type=int, metavar="N", help="images (default: 1 on a CPU, 64 on a GPU)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--train", action="store_true", help="a training step instead of an inference")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="profiled steps (default: 5)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw the figure: .png, .svg or .pdf")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")


def run(args: argparse.Namespace) -> int:
    for name in ("batch", "repeats"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    check_outputs(args.out, args.json)
    check_models(args.model)
    device = find_device(args.device)
    harness.prepare_process()
    environment = harness.environment(device)
    pass_ = TRAINING if args.train else INFERENCE
    batch = args.batch or BATCH[device.type]
    progress = ProgressBar(len(args.model) * (WARMUPS + args.repeats))
    profiles = [measure(name, pass_, batch, device, args.repeats, partial(progress.step, name)) for name in args.model]
    progress.close()
    print(report(profiles, environment["device"]))
    if args.json is not None:
        harness.save(args.json, environment, [found.record() for found in profiles])
    if args.out is not None:
        from dinat_triton import plots
        from dinat_triton.bench import figures

        plots.save(figures.plot_profiles(profiles, environment["device"]), args.out)
    return 0


def check_models(names: Sequence[str]) -> None:
    import timm

    import dinat_triton  # noqa: F401  (registers the models)

    for name in names:
        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists them"
            raise ValueError(f"unknown model {name!r}: {hint}")


def report(profiles: Sequence[Profile], device: str) -> str:
    first = profiles[0]
    parts = parts_in(profiles)
    header = [f"{first.pass_}, batch {first.batch}, {first.dtype}", "ms", "operations", *parts]
    rows = [
        [found.model, harness.milliseconds(1e3 * found.seconds), f"{found.operations}"]
        + [f"{found.shares[part]:.1%}" for part in parts]
        for found in profiles
    ]
    return f"Shares of a step on {device}\n\n{harness.table(header, rows)}"


def parts_in(profiles: Sequence[Profile]) -> list[str]:
    """The parts that any of them has."""
    return [part for part in PARTS if any(found.parts[part] > 0 for found in profiles)]
