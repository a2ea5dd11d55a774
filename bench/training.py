"""A step of `dinat-triton train` against the same step written out: what the loop around it costs."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from dinat_triton.bench import harness
from dinat_triton.bench.harness import Record, Results
from dinat_triton.commands.options import check_positive
from dinat_triton.commands.tables import milliseconds, table

BARE, LOOP = "bare step", "loop"
# The authors' recipe but for mixup: what is drawn from images is no part of a step.
OPTIONS = "digits --recipe imagenet --mixup 0 --cutmix 0 --img-size 224 --workers 0".split()  # noqa: SIM905


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="dinat_mini", help="any model of timm (default: dinat_mini)")
    parser.add_argument("--batch", type=int, default=2, help="images of a step (default: 2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument("--seconds", type=float, default=60, help="for each of the two (default: 60)")


def run(args: argparse.Namespace) -> Results:
    check_positive(args, "batch", "seconds")
    device = torch.device(args.device)
    environment = harness.environment(device)
    images = torch.randn(args.batch, 3, 224, 224, device=device)
    labels = torch.arange(args.batch, device=device) % 10
    with tempfile.TemporaryDirectory() as folder:
        calls = {BARE: bare_step(args.model, images, labels), LOOP: loop_step(args, Path(folder), images, labels)}
        for call in calls.values():
            call()
        timings = harness.measure(calls, args.seconds, device.type)
    problem = {"model": args.model, "batch": args.batch}
    records = [Record(problem, name, "training", "float32", timing) for name, timing in timings.items()]
    return Results("training", environment, records)


def bare_step(name: str, images: Tensor, labels: Tensor) -> Callable[[], object]:
    """A training step as everybody writes it first."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=10, device=images.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.05)

    def step() -> None:
        loss = nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def loop_step(args: argparse.Namespace, folder: Path, images: Tensor, labels: Tensor) -> Callable[[], object]:
    """A step of a run, with everything that it does after each."""
    from dinat_triton.commands import train

    parser = argparse.ArgumentParser()
    train.configure(parser)
    own = {"model": args.model, "batch-size": str(args.batch), "device": args.device, "out": str(folder / "run")}
    going = train.prepare(parser.parse_args([*OPTIONS, *(word for k, v in own.items() for word in (f"--{k}", v))]))
    going.engine.parallel.train()
    return lambda: going.take(images, labels)


def report(results: Results) -> str:
    rows = [
        [r.implementation, *map(milliseconds, (r.timing.median, r.timing.p20, r.timing.p80)), str(r.timing.calls)]
        for r in results.records
        if r.timing
    ]
    times = {r.implementation: r.timing.median for r in results.records if r.timing}
    cost = 100 * (times[LOOP] / times[BARE] - 1)
    return f"{table(['', 'ms', 'p20', 'p80', 'calls'], rows)}\n\nThe loop adds {cost:.1f} % to a step."
