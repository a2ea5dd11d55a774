"""Images per second and peak memory of the family against timm's models of the same size, all in one run.

Every mode of every model is measured side by side with the others: eager, compiled, and as a CUDA graph at batch 1.
The first call of each, with its compilation, is timed as well.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dinat_triton.bench import harness, memory
from dinat_triton.bench.harness import TIME_IS_UP, Record, Results, elapsed_ms
from dinat_triton.bench.layers import graphed
from dinat_triton.bench.runtimes import RUNTIMES
from dinat_triton.commands.options import check_names, check_positive, find_device, split
from dinat_triton.commands.tables import table
from dinat_triton.tuner.layer_run import first_line

INFERENCE, TRAINING = PASSES = ("inference", "training")
EAGER, COMPILED, FROZEN, GRAPH = "eager", "compile", "frozen", "graph"
# The first one is what the others are set against.
MODELS = (
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "convnext_tiny", "nat_mini", "dinat_mini", "nat_tiny",
    "dinat_tiny", "dinat_s_tiny",
)  # fmt: skip
BATCH = {"cpu": 1, "cuda": 64}
SECONDS = {"cpu": 4.0, "cuda": 1.0}


@dataclass(frozen=True)
class Case:
    """One way to run one model."""

    name: str
    pass_: str
    mode: str
    batch: int
    device: str
    autocast: bool

    @property
    def title(self) -> str:
        return self.name if self.mode == EAGER else f"{self.name} {self.mode}"

    def record(self) -> Record:
        dtype = "bfloat16" if self.autocast else "float32"
        return Record({"mode": self.mode, "batch": self.batch}, self.name, self.pass_, dtype)


# The steps


def step_of(model: nn.Module, images: Tensor, pass_: str, autocast: bool) -> Callable[[], object]:
    context = torch.autocast(images.device.type, torch.bfloat16, enabled=autocast)
    if pass_ == INFERENCE:

        def infer() -> Tensor:
            with torch.inference_mode(), context:
                return model(images)

        return infer
    labels = torch.arange(len(images), device=images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def train() -> None:
        with context:
            loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return train


def prepare(case: Case) -> Callable[[], object]:
    """A step of a fresh model with random weights; nothing has run yet."""
    model, images = model_of(case.name, case.pass_, case.batch, case.device)
    if case.mode in RUNTIMES:
        return RUNTIMES[case.mode](model, images)
    run: Any = model
    if case.mode in (COMPILED, FROZEN):
        run = torch.compile(model, dynamic=False, options={"freezing": case.mode == FROZEN})
    step = step_of(run, images, case.pass_, case.autocast)
    return graphed(lambda: step) if case.mode == GRAPH else step


def model_of(name: str, pass_: str, batch: int, device: str) -> tuple[nn.Module, Tensor]:
    """A model with random weights, and random images for it."""
    import timm

    import dinat_triton  # noqa: F401  (registers the models)

    torch.manual_seed(0)
    model: Any = timm.create_model(name, device=device).train(pass_ == TRAINING)
    return model, torch.randn(batch, *model.default_cfg["input_size"], device=device)


# Memory


def peak_memory(case: Case) -> int:
    """Bytes at most: allocated on a GPU; resident beyond the idle process on a CPU, in a process of its own there."""
    if case.device == "cpu":
        return memory.in_fresh_process(resident_peak, case, torch.get_num_threads())
    gc.collect()
    before = torch.cuda.memory_allocated()
    step = prepare(case)
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def resident_peak(case: Case, threads: int) -> int:
    """In the fresh process: bytes by which the resident set grew at most during a step."""
    import timm  # noqa: F401  (what importing takes is not the model's)

    import dinat_triton  # noqa: F401

    torch.set_num_threads(threads)
    return memory.resident_peak(lambda: prepare(case)())


# Measuring


def measure(cases: Sequence[Case], seconds: float, deadline: float, with_memory: bool) -> list[Record]:
    """Records of cases, measured side by side."""
    records = {case: case.record() for case in cases}
    steps: dict[str, Callable[[], object]] = {}
    for case, record in records.items():
        if time.monotonic() > deadline:
            record.reason = TIME_IS_UP
            continue
        try:
            step = prepare(case)
            record.also["first_call_ms"] = round(elapsed_ms(step, case.device), 2)
            steps[case.title] = step
        except Exception as error:
            record.reason = first_line(error)
    timings = harness.measure(steps, seconds, cases[0].device)
    steps.clear()
    for case, record in records.items():
        record.timing = timings.get(case.title)
        if with_memory and case.mode == EAGER and record.timing and time.monotonic() < deadline:
            try:
                record.also["peak_bytes"] = peak_memory(case)
            except (OSError, RuntimeError) as error:
                record.also["memory_reason"] = first_line(error)
    return list(records.values())


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL",
                        help="models of timm, ours among them; the first is what the others are set against (default: "
                        f"{' '.join(MODELS)})")  # fmt: skip
    parser.add_argument("--passes", nargs="+", default=list(PASSES), metavar="PASS",
                        help=f"of {', '.join(PASSES)} (default: both)")  # fmt: skip
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--batch", type=int, help="images (default: 1 on a CPU, 64 on a GPU)")
    parser.add_argument("--compile", nargs="*", metavar="MODEL",
                        help="models that are measured compiled as well; all with nothing behind it")  # fmt: skip
    parser.add_argument("--graph", action="store_true", help="inference at batch 1 as well, eager and as a CUDA graph")
    parser.add_argument("--runtimes", nargs="+", default=[], metavar="RUNTIME",
                        help="inference in these as well, side by side with eager, on a CPU: "
                        f"{', '.join(RUNTIMES)}; and "
                        f"{COMPILED}, or {FROZEN}: compiled with its weights as constants")  # fmt: skip
    parser.add_argument("--autocast", action="store_true", help="in bfloat16; always on a GPU")
    parser.add_argument("--seconds", type=float, help="for each model, mode and pass (default: 4, on a GPU 1)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin nothing after this time")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory")


def run(args: argparse.Namespace) -> Results:
    stages = stages_of(args)
    device = stages[0][0].device
    environment = harness.environment(torch.device(device))
    seconds = args.seconds or SECONDS[device]
    deadline = math.inf if args.budget is None else time.monotonic() + args.budget
    records: list[Record] = []
    with harness.stoppable():
        for cases in tqdm(stages, "models", disable=None):
            records += measure(cases, seconds, deadline, not args.no_memory)
    return Results("models", environment, records)


def stages_of(args: argparse.Namespace) -> list[list[Case]]:
    """Cases that are measured side by side, what is quick first: eager, graphs, then what has to be compiled."""
    check_positive(args, "batch", "seconds", "budget")
    device = find_device(args.device).type
    if args.graph and device != "cuda":
        raise RuntimeError("--graph was asked for, and CUDA graphs need a GPU")
    models, passes, runtimes = split(args.models), split(args.passes), split(args.runtimes)
    check_names("runtime", runtimes, [COMPILED, FROZEN, *RUNTIMES])
    if runtimes and (device != "cpu" or INFERENCE not in passes or args.autocast):
        raise ValueError("--runtimes measures inference in float32 on a CPU")
    check_models(models)
    check_names("pass", passes, PASSES)
    compiled = [] if args.compile is None else split(args.compile) or models
    check_names("model", compiled, models)
    batch, autocast = args.batch or BATCH[device], args.autocast or device == "cuda"
    eager = [[Case(name, pass_, EAGER, batch, device, autocast) for name in models] for pass_ in passes]
    stages = [list(each) for each in eager]
    if args.graph:
        single = [replace(case, pass_=INFERENCE, batch=1) for case in eager[0]]
        stages.append([*single, *(replace(case, mode=GRAPH) for case in single)])
    for stage in stages[: len(passes)]:
        stage += [replace(case, mode=to) for to in runtimes for case in stage if case.pass_ == INFERENCE]
    stages += [[replace(case, mode=COMPILED) for case in each if case.name in compiled] for each in eager]
    return [stage for stage in stages if stage]


def check_models(names: Sequence[str]) -> None:
    """Refuses models that timm does not know with ours registered."""
    import timm

    import dinat_triton  # noqa: F401

    check_names("model", names, timm.list_models())


# The report


def report(results: Results) -> str:
    """A table per pass and batch, against the first model in eager mode."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for r in results.records:
        groups.setdefault((r.pass_, r.problem["batch"]), []).append(r)
    tables = []
    for (pass_, batch), found in groups.items():
        header = [f"{pass_}, batch {batch}, {found[0].dtype}", "images/s", "speed", "MiB", "memory", "first call ms"]
        tables.append(table(header, [row(record, found[0]) for record in found]))
    lines = harness.reasons(results.records)
    for r in results.records:
        if "memory_reason" in r.also:
            lines.append(f"- memory of {r.implementation}, {r.pass_}: {r.also['memory_reason']}")
    return "\n".join(["\n\n".join(tables), *lines])


def row(record: Record, reference: Record) -> list[str]:
    """Speed and memory of a model, and over those of the reference."""
    peak, other = record.also.get("peak_bytes"), reference.also.get("peak_bytes")
    first, mode = record.also.get("first_call_ms"), record.problem["mode"]
    images = speed = "-"
    if record.timing:
        images = f"{1e3 * record.problem['batch'] / record.timing.median:.1f}"
        speed = f"{reference.timing.median / record.timing.median:.2f}" if reference.timing else "-"
    return [
        record.implementation + ("" if mode == EAGER else f" {mode}"),
        images,
        speed,
        f"{peak / 2**20:.0f}" if peak else "-",
        f"{peak / other:.2f}" if peak and other else "-",
        f"{first:.0f}" if first else "-",
    ]
