"""Images per second and peak memory of the family against timm's models of the same size, all in one run.

python -m dinat_triton.bench.models                     # CPU: batch 1, inference and training step
python -m dinat_triton.bench.models --device cuda       # batch 64, bfloat16 autocast
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import nn

import dinat_triton  # noqa: F401  (registers the models)
from dinat_triton.bench import harness
from dinat_triton.bench.harness import Record

INFERENCE, TRAINING = PASSES = ("inference", "training")
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
# Least speed and most memory against the group's reference.
TARGETS = {
    "cpu": {("dinat_mini", INFERENCE): (1.4, None), ("dinat_tiny", INFERENCE): (1.0, None)},
    "cuda": {("dinat_tiny", pass_): (1.25, 0.6) for pass_ in PASSES},
}


def step_of(model: nn.Module, images: torch.Tensor, pass_: str, autocast: bool) -> Callable[[], object]:
    context = torch.autocast(images.device.type, torch.bfloat16, enabled=autocast)
    if pass_ == INFERENCE:
        model.eval()

        def infer() -> torch.Tensor:
            with torch.inference_mode(), context:
                return model(images)

        return infer
    model.train()
    labels = torch.arange(len(images), device=images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def train() -> None:
        with context:
            loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return train


def prepare(name: str, pass_: str, args: argparse.Namespace) -> Callable[[], object]:
    torch.manual_seed(0)
    model = timm.create_model(name, device=args.device)
    images = torch.randn(args.batch, *model.default_cfg["input_size"], device=args.device)
    if args.channels_last:
        model, images = (x.to(memory_format=torch.channels_last) for x in (model, images))
    return step_of(model, images, pass_, args.autocast)


def peak_memory(name: str, pass_: str, args: argparse.Namespace) -> int | None:
    """Bytes at most: allocated on a GPU, resident beyond the idle process on a CPU, in a process of its own there."""
    if args.device.startswith("cuda"):
        step = prepare(name, pass_, args)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    command = [
        sys.executable,
        "-m",
        "dinat_triton.bench.models",
        "--measure-memory",
        name,
        pass_,
        "--batch",
        str(args.batch),
    ]
    command += ["--threads", str(args.threads)] + ["--autocast"] * args.autocast
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return int(child.stdout.split()[-1]) if child.returncode == 0 else None


def measure_memory(name: str, pass_: str, args: argparse.Namespace) -> int:
    """In the child: the resident set of a step at its highest, over that of torch and timm alone."""
    from dinat_triton.bench.cpu import _peak

    gc.collect()
    return _peak(lambda: prepare(name, pass_, args)())


def attention_share(name: str, args: argparse.Namespace) -> float:
    """Share of the time of an inference that is spent in attention, its projections not counted."""
    from torch.profiler import ProfilerActivity, profile

    step = prepare(name, INFERENCE, args)
    step()
    cuda = args.device.startswith("cuda")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiler:
        for _ in range(3):
            step()
    events = profiler.key_averages()

    def spent(event: Any, whole: bool) -> float:
        kind = "device" if cuda else "cpu"
        return getattr(event, f"{kind}_time_total" if whole else f"self_{kind}_time_total")

    total = sum(spent(event, whole=False) for event in events)
    return sum(spent(event, whole=True) for event in events if event.key == "dinat_triton::fused") / total


def measure_group(size: str, names: Sequence[str], pass_: str, args: argparse.Namespace) -> list[Record]:
    calls = {name: prepare(name, pass_, args) for name in names}
    for call in calls.values():
        call()
    synchronize = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    timings = harness.measure(calls, budget=args.budget, synchronize=synchronize)
    del calls
    dtype = "bfloat16" if args.autocast else "float32"
    records = []
    for name in names:
        problem: dict[str, Any] = {"group": size, "batch": args.batch}
        problem["peak_bytes"] = None if args.no_memory else peak_memory(name, pass_, args)
        records.append(Record(problem, name, pass_, dtype, timing=timings[name]))
    return records


def rows_of(records: Sequence[Record]) -> list[list[str]]:
    reference = records[0]
    rows = []
    for record in records:
        speed = reference.timing.median / record.timing.median
        memory, most = record.problem["peak_bytes"], reference.problem["peak_bytes"]
        rows.append(
            [
                record.implementation,
                f"{1e3 * record.problem['batch'] / record.timing.median:.1f}",
                f"{speed:.2f}",
                f"{memory / 2**20:.0f}" if memory else "-",
                f"{memory / most:.2f}" if memory and most else "-",
            ]
        )
    return rows


def verdicts(records: Sequence[Record], device: str) -> list[str]:
    reference = records[0]
    lines = []
    for record in records[1:]:
        target = TARGETS.get(device, {}).get((record.implementation, record.pass_))
        if target:
            speed = reference.timing.median / record.timing.median
            lines.append(f"{record.implementation} {record.pass_}: speed {speed:.2f}, target {target[0]}")
            if target[1] and record.problem["peak_bytes"]:
                memory = record.problem["peak_bytes"] / reference.problem["peak_bytes"]
                lines[-1] += f"; memory {memory:.2f}, target {target[1]}"
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=["tiny"])
    parser.add_argument("--models", nargs="+", help="only these of each group, with its reference")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument(
        "--batch", type=int, help="images; default 1 on a CPU, 64 elsewhere (training on a CPU: the same)"
    )
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for each model and pass (default: 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--autocast", action="store_true", help="in bfloat16; always on a GPU")
    parser.add_argument("--channels-last", action="store_true", help="convolutions of all models in NHWC")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-save", action="store_true", help="only print")
    parser.add_argument("--measure-memory", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    cuda = args.device.startswith("cuda")
    args.autocast |= cuda
    args.batch = args.batch or (64 if cuda else 1)
    if args.measure_memory:
        print(measure_memory(*args.measure_memory, args))
        return 0

    records: list[Record] = []
    for size in args.groups:
        names = [n for i, n in enumerate(GROUPS[size]) if i == 0 or not args.models or n in args.models]
        for pass_ in args.passes:
            group = measure_group(size, names, pass_, args)
            records += group
            header = [f"{size}, {pass_}, batch {args.batch}", "images/s", "speed", "MiB", "memory"]
            print("\n" + harness.table(header, rows_of(group)), flush=True)
            print("\n".join(verdicts(group, "cuda" if cuda else "cpu")), flush=True)
    share = attention_share("dinat_mini", args)
    print(f"\ndinat_mini spends {100 * share:.0f} % of an inference in attention")
    if not args.no_save:
        path = harness.default_path(args.device, "models")
        harness.save(path, harness.environment(args.device), records, attention_share={"dinat_mini": round(share, 3)})
        print(f"wrote {path.relative_to(harness.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
