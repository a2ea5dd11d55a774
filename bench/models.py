"""Images per second and peak memory of the family against timm's models of the same size, all in one run.

Every mode of every model is measured side by side with the others of its group: eager, compiled, and as a CUDA graph at
batch 1. The first call of each, with its compilation, is timed as well.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinat_triton.bench import compare, harness, ops
from dinat_triton.bench.harness import Record
from dinat_triton.bench.memory import EAGER_ALLOCATOR, in_fresh_process, resident_peak
from dinat_triton.bench.ops import TIME_IS_UP, first_line, graphed
from dinat_triton.bench.outputs import check_outputs
from dinat_triton.bench.selection import check_names, find_device, split
from dinat_triton.progress import ProgressBar

INFERENCE, TRAINING = PASSES = ("inference", "training")
EAGER, COMPILED, GRAPH = "eager", "compile", "graph"
# By size, the reference first: what the others' speed and memory are set against.
GROUPS = {
    "tiny": (
        "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256",
        "convnext_tiny",
        "nat_mini",
        "dinat_mini",
        "nat_tiny",
        "dinat_tiny",
        "dinat_s_tiny",
    ),
    "small": (
        "swin_small_patch4_window7_224",
        "swinv2_small_window8_256",
        "convnext_small",
        "dinat_small",
        "dinat_s_small",
    ),
    "base": ("swin_base_patch4_window7_224", "swinv2_base_window8_256", "convnext_base", "dinat_base", "dinat_s_base"),
}
# Least speed and most memory against the group's reference, in eager mode.
TARGETS: dict[str, dict[tuple[str, str], tuple[float, float | None]]] = {
    "cpu": {("dinat_mini", INFERENCE): (1.4, None), ("dinat_tiny", INFERENCE): (1.0, None)},
    "cuda": {("dinat_tiny", pass_): (1.25, 0.6) for pass_ in PASSES},
}
BATCH = {"cpu": 1, "cuda": 64}
SECONDS = {"cpu": 4.0, "cuda": 1.0}


@dataclass(frozen=True)
class Case:
    """One way to run one model."""

    group: str
    name: str
    pass_: str
    mode: str
    batch: int
    device: str
    autocast: bool
    channels_last: bool

    @property
    def title(self) -> str:
        return self.name if self.mode == EAGER else f"{self.name} {self.mode}"

    def record(self, **found: Any) -> Record:
        problem: dict[str, Any] = {"group": self.group, "batch": self.batch, "mode": self.mode}
        if self.channels_last:
            problem["layout"] = "channels last"
        return Record(problem, self.name, self.pass_, "bfloat16" if self.autocast else "float32", **found)


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
    import timm

    torch.manual_seed(0)
    model: Any = timm.create_model(case.name, device=case.device).train(case.pass_ == TRAINING)
    images = torch.randn(case.batch, *model.default_cfg["input_size"], device=case.device)
    if case.channels_last:
        model, images = (x.to(memory_format=torch.channels_last) for x in (model, images))
    run: Any = torch.compile(model, dynamic=False) if case.mode == COMPILED else model
    step = step_of(run, images, case.pass_, case.autocast)
    return graphed(lambda: step) if case.mode == GRAPH else step


def peak_memory(case: Case) -> int:
    """Bytes at most: allocated on a GPU; resident beyond the idle process on a CPU, in a process of its own there."""
    if case.device == "cpu":
        return in_fresh_process(measure_memory, EAGER_ALLOCATOR, threads=torch.get_num_threads(), **vars(case))
    gc.collect()
    before = torch.cuda.memory_allocated()
    step = prepare(case)
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def measure_memory(threads: int, **case: Any) -> int:
    """In the child."""
    import timm  # noqa: F401  (what importing takes is not the model's)

    import dinat_triton  # noqa: F401

    torch.set_num_threads(threads)
    return resident_peak(lambda: prepare(Case(**case))())


# What takes how long


Found = dict[str, dict[str, Any]]


def measure(
    cases: Sequence[Case], seconds: float, deadline: float, memory: bool, note: Callable[[str], None]
) -> list[Record]:
    """Records of cases, measured side by side."""
    steps, found = first_calls(cases, deadline, note)
    note(f"{cases[0].pass_}: measuring")
    for title, timing in harness.measure(steps, budget=seconds, synchronize=synchronizer(cases[0])).items():
        found[title]["timing"] = timing
    steps.clear()
    for case in cases:
        if memory and case.mode == EAGER and "timing" in found[case.title] and time.monotonic() < deadline:
            note(f"{case.title}, {case.pass_}: memory")
            found[case.title]["also"] |= memory_of(case)
    return [case.record(**found[case.title]) for case in cases]


def first_calls(
    cases: Sequence[Case], deadline: float, note: Callable[[str], None]
) -> tuple[dict[str, Callable[[], object]], Found]:
    """Warm steps, and of every case how long the first call took, or why there is none."""
    steps: dict[str, Callable[[], object]] = {}
    found: Found = {case.title: {"also": {}} for case in cases}
    for case in cases:
        note(f"{case.title}, {case.pass_}: the first call")
        try:
            if time.monotonic() > deadline:
                raise TimeoutError
            step = prepare(case)
            start = time.perf_counter()
            step()
            synchronizer(case)()
            found[case.title]["also"]["first_call_ms"] = round(1e3 * (time.perf_counter() - start), 2)
            steps[case.title] = step
        except TimeoutError:
            found[case.title]["reason"] = TIME_IS_UP
        except Exception as error:
            found[case.title]["reason"] = describe(error)
    return steps, found


def synchronizer(case: Case) -> Callable[[], None]:
    return torch.cuda.synchronize if case.device == "cuda" else lambda: None


def memory_of(case: Case) -> dict[str, Any]:
    try:
        return {"peak_bytes": peak_memory(case)}
    except RuntimeError as error:
        return {"memory_reason": describe(error)}


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


# What was found


def report(records: Sequence[Record]) -> str:
    """A table per group, pass and batch, against the group's reference in eager mode."""
    groups: dict[tuple[str, str, int], list[Record]] = {}
    for r in records:
        groups.setdefault((r.problem["group"], r.pass_, r.problem["batch"]), []).append(r)
    tables = []
    for (group, pass_, batch), found in groups.items():
        header = [f"{group}, {pass_}, batch {batch}", "images/s", "speed", "MiB", "memory", "first call ms"]
        tables.append(harness.table(header, [row(record, found) for record in found]))
    lines = ops.reasons(records)
    for r in records:
        if "memory_reason" in r.also:
            lines.append(f"- memory of {r.implementation}, {r.pass_}: {r.also['memory_reason']}")
    return "\n".join(["\n\n".join(tables), *lines])


def row(record: Record, group: Sequence[Record]) -> list[str]:
    memory, ratio = record.also.get("peak_bytes"), memory_ratio(record, group)
    first, faster = record.also.get("first_call_ms"), speed(record, group)
    images = "-" if record.timing is None else f"{1e3 * record.problem['batch'] / record.timing.median:.1f}"
    mode = record.problem["mode"]
    return [
        record.implementation + ("" if mode == EAGER else f" {mode}"),
        images,
        f"{faster:.2f}" if faster else "-",
        f"{memory / 2**20:.0f}" if memory else "-",
        f"{ratio:.2f}" if ratio else "-",
        f"{first:.0f}" if first else "-",
    ]


def reference_of(record: Record, group: Sequence[Record]) -> Record | None:
    """What a record is set against."""
    name = GROUPS[record.problem["group"]][0]
    return next((r for r in group if r.implementation == name and r.problem["mode"] == EAGER), None)


def speed(record: Record, group: Sequence[Record]) -> float | None:
    """Images per second over those of the reference."""
    reference = reference_of(record, group)
    if record.timing is None or reference is None or reference.timing is None:
        return None
    return reference.timing.median / record.timing.median


def memory_ratio(record: Record, group: Sequence[Record]) -> float | None:
    reference = reference_of(record, group)
    mine, other = (None if r is None else r.also.get("peak_bytes") for r in (record, reference))
    return mine / other if mine and other else None


def judge(records: Sequence[Record], device: str) -> list[dict[str, Any]]:
    """Every target that was measured, what was reached, and whether that meets it."""
    verdicts = []
    for record in records:
        target = TARGETS[device].get((record.implementation, record.pass_))
        if target is None or record.problem["mode"] != EAGER or record.problem["batch"] != BATCH[device]:
            continue
        group = [r for r in records if (r.problem["group"], r.pass_) == (record.problem["group"], record.pass_)]
        group = [r for r in group if r.problem["batch"] == record.problem["batch"]]
        least, most = target
        found, memory = speed(record, group), memory_ratio(record, group)
        name = f"{record.implementation} {record.pass_}"
        if found:
            verdicts.append({"target": f"{name} at least {least}x the speed", "value": round(found, 3),
                             "met": found >= least})  # fmt: skip
        if most and memory:
            verdicts.append({"target": f"{name} at most {most}x the memory", "value": round(memory, 3),
                             "met": memory <= most})  # fmt: skip
    return verdicts


# The command


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--groups", nargs="+", default=["tiny"], metavar="GROUP",
                        help=f"of {', '.join(GROUPS)} (default: tiny)")  # fmt: skip
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="only these of each group, with its reference")
    parser.add_argument("--passes", nargs="+", default=list(PASSES), metavar="PASS",
                        help=f"of {', '.join(PASSES)} (default: both)")  # fmt: skip
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--batch", type=int, help="images (default: 1 on a CPU, 64 on a GPU)")
    parser.add_argument("--compile", nargs="*", metavar="MODEL",
                        help="models that are measured compiled as well; all with nothing behind it")  # fmt: skip
    parser.add_argument("--graph", action="store_true", help="inference at batch 1 as well, eager and as a CUDA graph")
    parser.add_argument("--autocast", action="store_true", help="in bfloat16; always on a GPU")
    parser.add_argument("--channels-last", action="store_true", help="convolutions of all models in NHWC")
    parser.add_argument("--seconds", type=float, help="for each model, mode and pass (default: 4, on a GPU 1)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin nothing after this time")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    parser.add_argument("--no-save", action="store_true", help="only print")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="result file (default: bench/results/<device>/models.json)")  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    compare.add_option(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 1 if a model of ours failed, or if that was asked for and a target is missed."""
    if args.compare:
        return compare.compare_files(*args.compare)
    stages = find_stages(args)
    check_outputs(file=args.out)
    check_timm()
    harness.prepare_process(args.threads)
    device = stages[0][0].device
    env = harness.environment(device)
    path = args.out or harness.default_path(device, "models")
    seconds = args.seconds or SECONDS[device]
    deadline = math.inf if args.budget is None else time.monotonic() + args.budget
    progress = ProgressBar(len(stages))
    records: list[Record] = []
    for cases in stages:
        records += measure(cases, seconds, deadline, not args.no_memory, progress.note)
        progress.step(f"{cases[0].group}, {cases[0].pass_}")
        if not args.no_save:
            harness.save(path, env, records, targets=judge(records, device))
    progress.close()
    verdicts = judge(records, device)
    print("\n".join([report(records), "", *map(harness.verdict_line, verdicts)]))
    if not args.no_save:
        print(f"\nWrote {harness.shown(path)}")
    failed = [
        r for r in records if r.implementation.startswith(("nat", "dinat")) and r.reason not in (None, TIME_IS_UP)
    ]
    missed = args.strict and not all(v["met"] for v in verdicts)
    return 1 if failed or missed else 0


def find_stages(args: argparse.Namespace) -> list[list[Case]]:
    """Cases that are measured side by side, what is quick first: eager, graphs, then what has to be compiled."""
    device = find_device(args.device).type
    for name in ("batch", "threads", "seconds", "budget"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} must be positive, got {value}")
    if args.graph and device != "cuda":
        raise RuntimeError("--graph was asked for, and CUDA graphs need a GPU")
    groups, passes = split(args.groups), split(args.passes)
    check_names("group", groups, GROUPS)
    check_names("pass", passes, PASSES)
    known = [name for group in groups for name in GROUPS[group]]
    models = known if args.models is None else split(args.models)
    compiled = [] if args.compile is None else split(args.compile) or known
    check_names("model", (*models, *compiled), known)

    options = {"device": device, "autocast": args.autocast or device == "cuda", "channels_last": args.channels_last}

    def cases(group: str, pass_: str) -> list[Case]:
        names = [n for i, n in enumerate(GROUPS[group]) if i == 0 or n in models]
        return [Case(group, name, pass_, EAGER, args.batch or BATCH[device], **options) for name in names]

    eager = [cases(group, pass_) for group in groups for pass_ in passes]
    stages = list(eager)
    if args.graph:
        single = [[replace(case, batch=1) for case in cases(group, INFERENCE)] for group in groups]
        stages += [[*each, *(replace(case, mode=GRAPH) for case in each)] for each in single]
    for each in eager:
        stages.append([replace(case, mode=COMPILED) for case in each if case.name in compiled])
    return [stage for stage in stages if stage]


def check_timm() -> None:
    """The models register themselves only where timm is new enough."""
    try:
        import timm

        import dinat_triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"the models need timm: {error}") from None
    if not timm.is_model("dinat_mini"):
        raise RuntimeError(f"the models need timm >= 1.0.31, and this is {timm.__version__}")
