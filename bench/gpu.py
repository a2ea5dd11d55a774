"""The Triton backend on a GPU: is it right, is it clean, how fast is it. Parts of `bench/gpu_run.sh`.

python -m dinat_triton.bench.gpu check --out DIR     # every DiNAT layer against float64
python -m dinat_triton.bench.gpu small               # a few small calls, for compute-sanitizer
python -m dinat_triton.bench.gpu time --out DIR      # every layer against its peers
python -m dinat_triton.bench.gpu report --out DIR    # everything that was found, as tables

With --dry-run all of it runs on the CPU, on the smallest layers and in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dinat_triton as dt
from dinat_triton.bench import first_call, harness, models, ops, overhead
from dinat_triton.bench.ceilings import measure_ceilings
from dinat_triton.bench.harness import BACKWARD, FORWARD, Record
from dinat_triton.bench.ops import Bench, Cell, first_line, problem_of
from dinat_triton.bench.peers import Problem
from dinat_triton.layers import Layer, layers_of
from dinat_triton.tuner.layer_run import FLOAT32_ERROR, errors, poisoned

OURS = ops.OURS["cuda"]
CHECKED = ("dinat_mini@224", "dinat_mini@384", "dinat_mini@coco", "dinat_large@224")
TIMED = (("dinat_mini@224", 128), ("dinat_large@224", 128), ("dinat_mini@224", 1), ("dinat_large@224", 1))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Milliseconds of layers of DiNAT-Mini, batch 128, bf16, on an H200: dense and sliding.
TARGETS = {
    ("224/56x56-d8", FORWARD): 0.055,
    ("224/56x56-d1", FORWARD): 0.080,
    ("224/56x56-d8", BACKWARD): 0.115,
    ("224/56x56-d1", BACKWARD): 0.220,
}
TINY = [Layer("tiny/7x7-d1", (7, 7), 2, (1, 1)), Layer("tiny/9x8-d1", (9, 8), 1, (1, 1)),
        Layer("tiny/14x15-d2", (14, 15), 1, (2, 2))]  # fmt: skip
DRY_PEERS = ("sdpa", "swin")
DRY_SECONDS = 0.01


# Is it right


def draw(problem: Problem, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """A packed query, key and value, the bias, and gradients of the output and of the log-sum-exp."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    shape, heads, dim = (problem.batch, *problem.shape), problem.heads, problem.dim
    bias = normal(heads, *(2 * k - 1 for k in problem.kernel_size))
    return normal(*shape, 3, heads, dim), bias, normal(*shape, heads, dim), normal(*shape, heads)


def tensors_of(problem: Problem, tensors: Sequence[Tensor], backend: str) -> dict[str, Tensor]:
    """Output, log-sum-exp and every gradient, of both of them."""
    packed, rpb, grad_out, grad_lse = tensors
    packed, rpb = packed.detach().requires_grad_(), rpb.detach().requires_grad_()
    rank = len(problem.shape)
    window = [*problem.kernel_size, *[1] * rank, *problem.dilation, *[0] * rank]
    out, lse = torch.ops.dinat_triton.na([packed], window, rpb, None, 0.0, True, backend)
    grads = torch.autograd.grad((out, lse), (packed, rpb), (grad_out, grad_lse.to(lse.dtype)))
    named = dict(zip(("dq", "dk", "dv"), grads[0].unbind(-3), strict=True))
    return {"out": out.detach(), "lse": lse.detach(), **named, "drpb": grads[1]}


def check_layer(problem: Problem, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Ours against float64: no error above 2 eps of the dtype, with room for long sums in float32."""
    tensors = draw(problem, dtype, device)
    truth = tensors_of(problem, [x.double() for x in tensors], "reference")
    with poisoned():
        first = tensors_of(problem, tensors, OURS)
        again = tensors_of(problem, tensors, OURS)
    found = errors(first, truth)
    allowed = max(2 * torch.finfo(dtype).eps, FLOAT32_ERROR)
    wrong = [name for name, error in found.items() if not error <= allowed]
    return {
        "errors": found,
        "allowed": allowed,
        "wrong": wrong,
        "repeats": all(torch.equal(first[name], again[name]) for name in first),
    }


def check(options: argparse.Namespace) -> int:
    device, deadline = options.device, time.monotonic() + options.budget
    named = [("tiny", TINY)] if options.dry_run else [(name, layers_of(name)) for name in CHECKED]
    dtypes = DTYPES[:2] if options.dry_run else DTYPES
    cells = [(problem_of(name.partition("@")[0], x, 1 if name.endswith("coco") else 2), t) for name, of in named
             for t in dtypes for x in of]  # fmt: skip
    found, bad = [], 0
    for problem, dtype in cells:
        record: dict[str, Any] = {"problem": problem.to_dict(), "dtype": str(dtype).removeprefix("torch.")}
        try:
            if time.monotonic() > deadline:
                record["reason"] = "the time was up"
            else:
                record |= check_layer(problem, dtype, device)
        except torch.OutOfMemoryError:
            record["reason"] = "float64 does not fit"
            torch.cuda.empty_cache()
        except Exception as error:
            record["wrong"] = [f"{type(error).__name__}: {first_line(error)}"]
        if wrong := record.get("wrong") or ([] if record.get("repeats", True) else ["does not repeat"]):
            bad += 1
            print(f"WRONG {problem.label} {record['dtype']}: {', '.join(wrong)}", flush=True)
        found.append(record)
    skipped = sum("reason" in record for record in found)
    print(f"{len(found)} layers and dtypes: {bad} wrong, {skipped} skipped")
    head = {"schema": harness.SCHEMA, "environment": harness.environment(device), "layers": found}
    (options.out / "check.json").write_text(json.dumps(head, indent=1) + "\n")
    return 1 if bad or skipped == len(found) else 0


# Is it clean


def small(options: argparse.Namespace) -> int:
    """Every kernel once, on shapes with ragged tiles, so that a sanitizer ends soon."""
    cases: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((14, 15), {"kernel_size": 7, "dilation": 2}),
        ((17, 9), {"kernel_size": 7}),
        ((37,), {"kernel_size": 5, "is_causal": True, "dropout_p": 0.2}),
        ((5, 6, 4), {"kernel_size": 3, "stride": 2}),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        for shape, window in cases:
            heads, rank = 2, len(shape)
            packed = torch.randn(2, *shape, 3, heads, 24, device=options.device, dtype=dtype, requires_grad=True)
            bias = torch.randn(heads, *[2 * window["kernel_size"] - 1] * rank, device=options.device, dtype=dtype)
            function = (dt.na1d, dt.na2d, dt.na3d)[rank - 1]
            out = function(*packed.unbind(-3), rpb=bias.requires_grad_(), backend=OURS, **window)
            grads = torch.autograd.grad(out.float().square().sum(), (packed, bias))
            if not all(bool(x.isfinite().all()) for x in (out, *grads)):
                print(f"not finite: {shape} {window} {dtype}")
                return 1
    print("finite")
    return 0


# How fast is it


def time_layers(options: argparse.Namespace) -> int:
    """Until the time is up: first ours everywhere, then peer by peer, those that compile long last."""
    env = harness.environment(options.device)
    timed = [("tiny", TINY, 1)] if options.dry_run else [(name, layers_of(name), batch) for name, batch in TIMED]
    problems = [problem_of(name.partition("@")[0], x, batch) for name, layers, batch in timed for x in layers]
    cells = [Cell(problem, torch.bfloat16, pass_) for problem in problems for pass_ in (FORWARD, BACKWARD)]
    mine = [ops.ours(OURS)] if options.dry_run else [ops.ours(OURS), ops.ours_graphed(OURS)]
    chosen = ops.find_peers(DRY_PEERS if options.dry_run else None, options.device)
    seconds = DRY_SECONDS if options.dry_run else ops.SECONDS
    ceilings = measure_ceilings(options.device)
    bench = Bench(options.device, OURS, ceilings, seconds, deadline=time.monotonic() + options.budget)
    records: list[Record] = []
    for group in (mine, *([peer] for peer in chosen)):
        for cell in cells:
            records += bench.measure(cell, group)
        print(f"{group[0].name}: {sum(r.timing is not None for r in records)} times so far", flush=True)
        harness.add_ratios(records, OURS)
        ops.save(options.out / "layers.json", env, records, bench)
    return ops.verdict(records, OURS, strict=False)


# What was found


def report(options: argparse.Namespace) -> int:
    """Every result file in the folder as a table; 1 if no layer was timed."""
    path = options.out / "layers.json"
    if path.exists():
        report_layers(path)
    else:
        print("No layer was timed.")
    for name, module in (("models", models), ("first_call", first_call), ("overhead", overhead)):
        found = options.out / f"{name}.json"
        if found.exists():
            print(f"\n{module.report(harness.load_records(found))}")
            for verdict in harness.load(found).get("targets", []):
                print(harness.verdict_line(verdict))
    return int(not path.exists())


def report_layers(path: Path) -> None:
    data, records = harness.load(path), harness.load_records(path)
    limits = data["ceilings"]
    print(f"{data['environment']['device']}: copy {limits['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
          f"bf16 product {limits['product_flops_per_s']['bfloat16'] / 1e12:.0f} TFLOP/s\n")  # fmt: skip
    print(ops.report(records, OURS))
    if "H200" in data["environment"]["device"]:
        print("\n".join(map(harness.verdict_line, judge(records))))


def judge(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The targets of DiNAT-Mini's first level at batch 128, in milliseconds."""
    verdicts = []
    for r in records:
        target = TARGETS.get((r.problem["name"], r.pass_))
        whose = (r.problem["model"], r.problem["batch"], r.implementation)
        if target and r.timing and whose == ("dinat_mini", 128, OURS):
            us = 1e3 * r.timing.median
            name = f"{r.problem['name']} {r.pass_} at most {1e3 * target:.0f} us"
            verdicts.append({"target": name, "value": round(us, 2), "met": r.timing.median <= target})
    return verdicts


PARTS = {"check": check, "small": small, "time": time_layers, "report": report}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dinat_triton.bench.gpu", description="Checks and times the Triton backend.")
    parser.add_argument("part", choices=(*PARTS, "where"))
    parser.add_argument("--out", type=Path, help="folder of the results (default: bench/results/<device>)")
    parser.add_argument("--budget", type=float, default=120, help="seconds after which no more is begun (default: 120)")
    parser.add_argument(
        "--dry-run", action="store_true", help="on the CPU, in the interpreter, with tiny layers and no budget"
    )
    options = parser.parse_args(arguments)
    options.device = torch.device("cpu" if options.dry_run else "cuda")
    if not options.dry_run and not torch.cuda.is_available():
        print("bench.gpu: torch sees no GPU; --dry-run tries everything on the CPU", file=sys.stderr)
        return 2
    if options.dry_run:
        options.budget = math.inf
    options.out = options.out or harness.default_path(options.device, "gpu").parent
    if options.part == "where":
        print(options.out)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    return PARTS[options.part](options)


if __name__ == "__main__":
    sys.exit(main())
