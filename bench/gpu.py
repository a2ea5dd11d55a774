"""The Triton backend on a GPU: is it right, is it clean, how fast is it. `bench/gpu_run.sh` runs all of this.

python -m dinat_triton.bench.gpu check --out DIR     # every DiNAT layer against float64
python -m dinat_triton.bench.gpu small               # a few small calls, for compute-sanitizer
python -m dinat_triton.bench.gpu time --out DIR      # every layer against its peers
python -m dinat_triton.bench.gpu report --out DIR    # what was found, as a table

With --dry-run all of it runs on the CPU, on the smallest layers and in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dinat_triton as dt
from dinat_triton.bench import harness, peers
from dinat_triton.bench.harness import Record, Timing
from dinat_triton.bench.peers import Call, Inputs, Peer, Problem
from dinat_triton.layers import Layer, layers_of

OURS = "triton"
FORWARD, BACKWARD = "forward", "backward"
CHECKED = ("dinat_mini@224", "dinat_mini@384", "dinat_mini@coco", "dinat_large@224")
TIMED = (("dinat_mini@224", 128), ("dinat_large@224", 128), ("dinat_mini@224", 1), ("dinat_large@224", 1))
# Those that compile long come last.
PEERS = ("natten", "sdpa", "flex-tuned", "flex")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32_ERROR = 1e-5
# Milliseconds at the first level of DiNAT-Mini, batch 128, bf16, on an H200: (dense, sliding).
TARGETS = {FORWARD: (0.055, 0.080), BACKWARD: (0.115, 0.220)}
TINY = [Layer("7x7-d1", (7, 7), 2, (1, 1)), Layer("9x8-d1", (9, 8), 1, (1, 1)),
        Layer("14x15-d2", (14, 15), 1, (2, 2))]  # fmt: skip


def problem_of(layer: Layer, batch: int, model: str) -> Problem:
    weight = layer.count
    return Problem(f"{model}:{layer.name}", layer.shape, layer.heads, layer.dim, layer.kernel_size, layer.dilation,
                   batch, weight)  # fmt: skip


def draw(problem: Problem, dtype: torch.dtype, device: torch.device, grad: bool) -> tuple[Tensor, Inputs]:
    """Inputs made where they are needed; query, key and value are views of the packed tensor, as in a model."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    packed = normal(problem.batch, *problem.shape, 3, problem.heads, problem.dim).requires_grad_(grad)
    query, key, value = (x.detach().contiguous().requires_grad_(grad) for x in packed.unbind(-3))
    rpb = normal(problem.heads, *(2 * k - 1 for k in problem.kernel_size)).requires_grad_(grad)
    return packed, Inputs(query, key, value, rpb, normal(*query.shape))


def ours(problem: Problem, packed: Tensor, rpb: Tensor, backend: str = OURS) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    rank = len(problem.shape)
    window = [*problem.kernel_size, *[1] * rank, *problem.dilation, *[0] * rank]
    return torch.ops.dinat_triton.na([packed], window, rpb, None, 0.0, True, backend)


# Is it right


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised tensors hold NaN: what nobody wrote cannot pass for a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def tensors_of(problem: Problem, tensors: Sequence[Tensor], backend: str) -> dict[str, Tensor]:
    """Output, log-sum-exp and every gradient, of both of them."""
    packed, rpb, grad_out, grad_lse = tensors
    packed, rpb = packed.detach().requires_grad_(), rpb.detach().requires_grad_()
    out, lse = ours(problem, packed, rpb, backend)
    grads = torch.autograd.grad((out, lse), (packed, rpb), (grad_out, grad_lse.to(lse.dtype)))
    named = dict(zip(("dq", "dk", "dv"), grads[0].unbind(-3), strict=True))
    return {"out": out.detach(), "lse": lse.detach(), **named, "drpb": grads[1]}


def errors(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Of each tensor, the norm of its error over its own; NaN stays NaN."""
    return {
        name: (torch.linalg.vector_norm(found[name].double() - x) / torch.linalg.vector_norm(x)).item()
        for name, x in truth.items()
    }


def check_layer(problem: Problem, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Ours against float64, and beside it what plain torch makes of the same low-precision numbers."""
    packed, inputs = draw(problem, dtype, device, grad=False)
    grad_lse = torch.randn(inputs.query.shape[:-1], device=device)
    tensors = (packed, inputs.rpb, inputs.grad_out, grad_lse)
    truth = tensors_of(problem, [x.double() for x in tensors], "reference")
    with poisoned():
        first = tensors_of(problem, tensors, OURS)
        again = tensors_of(problem, tensors, OURS)
    found = errors(first, truth)
    if dtype == torch.float32:
        allowed = dict.fromkeys(found, FLOAT32_ERROR)
    else:
        eager = errors(tensors_of(problem, tensors, "reference"), truth)
        allowed = {name: 2 * error + 1e-6 for name, error in eager.items()}
    wrong = [name for name, error in found.items() if not error <= allowed[name]]
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
    cells = [(problem_of(x, 2 if name != "dinat_mini@coco" else 1, name), t) for name, of in named
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
            print(f"WRONG {problem.name} {record['dtype']}: {', '.join(wrong)}", flush=True)
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


def timings(call: Callable[[], object], device: torch.device) -> Timing:
    """On a GPU by events, with a cold L2."""
    if device.type != "cuda":
        return harness.measure({"": call}, budget=0.01, slice_s=0.005)[""]
    from triton.testing import do_bench

    return Timing.of(do_bench(call, warmup=10, rep=60, return_mode="all"))


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The same work without Python in between."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def our_calls(problem: Problem, packed: Tensor, inputs: Inputs) -> dict[tuple[str, str], Callable[[], object]]:
    """By implementation and pass. A graph holds the backward's op alone: autograd would add its own streams."""
    with torch.no_grad():
        rank = len(problem.shape)
        window = [*problem.kernel_size, *[1] * rank, *problem.dilation, *[0] * rank]
        scale = problem.dim**-0.5
        out, lse = ours(problem, packed, inputs.rpb)
    attended = ours(problem, packed, inputs.rpb)[0]

    def forward() -> object:
        with torch.no_grad():
            return ours(problem, packed, inputs.rpb)

    def backward_op() -> object:
        with torch.no_grad():
            return torch.ops.dinat_triton.fused_backward(
                [packed], inputs.rpb, None, out, lse, inputs.grad_out, None, window, scale, 0.0, OURS
            )

    def backward() -> object:
        return torch.autograd.grad(attended, (packed, inputs.rpb), inputs.grad_out, retain_graph=True)

    calls: dict[tuple[str, str], Callable[[], object]] = {(OURS, FORWARD): forward, (OURS, BACKWARD): backward}
    if packed.device.type == "cuda":
        for pass_, call in ((FORWARD, forward), (BACKWARD, backward_op)):
            call()
            calls[f"{OURS} graph", pass_] = graphed(call)
    return calls


def peer_calls(peer: Peer, problem: Problem, inputs: Inputs, expected: Tensor) -> dict[str, Callable[[], object]]:
    """Forward and backward of a peer that agrees with us; raises where there is none."""
    if reason := peer.obstacle(inputs):
        raise RuntimeError(reason)
    call: Call = peer.prepare(problem, inputs)
    out = call()
    if peer.has_bias:
        difference = (out - expected).abs().max().item()
        if not difference <= 0.1:
            raise RuntimeError(f"its result differs from ours by {difference:.1e}")
    leaves = inputs.leaves if peer.has_bias else inputs.leaves[:3]

    def forward() -> object:
        with torch.no_grad():
            return call()

    forward()
    return {FORWARD: forward, BACKWARD: lambda: torch.autograd.grad(out, leaves, inputs.grad_out, retain_graph=True)}


def work(problem: Problem, pass_: str, itemsize: int, bandwidth: float) -> dict[str, float]:
    """Bytes and operations that nothing can do without, and what the bytes take: 4 tensors, or 8 in the backward."""
    maps = problem.batch * problem.heads
    tensor = maps * problem.tokens * problem.dim * itemsize
    pairs = problem.tokens
    for k in problem.kernel_size:
        pairs *= k
    moved = (4 if pass_ == FORWARD else 8) * tensor
    products = 2 if pass_ == FORWARD else 5
    flops = 2 * products * pairs * maps * problem.dim
    return {"bytes": moved, "flops": flops, "floor_ms": round(1e3 * moved / bandwidth, 6)}


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes per second of a copy, read and written, and operations per second of a large bf16 product."""
    size, side = (1 << 30, 8192) if device.type == "cuda" else (1 << 22, 64)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    copy = timings(lambda: target.copy_(source), device).median
    product = timings(lambda: a @ b, device).median
    return {"copy_bytes_per_s": 2 * size / copy * 1e3, "bf16_flops_per_s": 2 * side**3 / product * 1e3}


class Timer:
    """Times cells until its time is up: first ours everywhere, then peer by peer."""

    def __init__(self, options: argparse.Namespace, limits: Mapping[str, float]):
        self.device, self.deadline, self.limits = options.device, time.monotonic() + options.budget, limits
        self.records: list[Record] = []

    @property
    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def add(self, problem: Problem, implementation: str, pass_: str, **found: Any) -> None:
        needed = work(problem, pass_, 2, self.limits["copy_bytes_per_s"])
        if timing := found.get("timing"):
            needed["fraction_of_floor"] = round(needed["floor_ms"] / timing.median, 4)
        self.records.append(Record(problem.to_dict(), implementation, pass_, "bfloat16", work=needed, **found))

    def time_ours(self, problem: Problem) -> None:
        try:
            packed, inputs = draw(problem, torch.bfloat16, self.device, grad=True)
            for (name, pass_), call in our_calls(problem, packed, inputs).items():
                self.add(problem, name, pass_, timing=timings(call, self.device))
        except Exception as error:
            self.add(problem, OURS, FORWARD, reason=f"{type(error).__name__}: {first_line(error)}")
        self.clear()

    def time_peer(self, problem: Problem, peer: Peer) -> None:
        reason = "the time was up" if self.over else None
        if reason is None:
            try:
                packed, inputs = draw(problem, torch.bfloat16, self.device, grad=True)
                with torch.no_grad():
                    expected = ours(problem, packed, inputs.rpb)[0]
                for pass_, call in peer_calls(peer, problem, inputs, expected).items():
                    self.add(problem, peer.name, pass_, timing=timings(call, self.device))
                    print(f"{problem.name} b{problem.batch} {peer.name} {pass_}", flush=True)
            except Exception as error:
                reason = first_line(error)
        if reason is not None:
            self.add(problem, peer.name, FORWARD, reason=reason)
        self.clear()

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def time_layers(options: argparse.Namespace) -> int:
    env = harness.environment(options.device)
    if options.dry_run:
        problems = [problem_of(layer, 1, "tiny") for layer in TINY]
    else:
        problems = [problem_of(layer, batch, name) for name, batch in TIMED for layer in layers_of(name)]
    timer = Timer(options, ceilings(options.device))
    for problem in problems:
        timer.time_ours(problem)
    save(options.out, env, timer)
    chosen = peers.find(["sdpa"] if options.dry_run else PEERS)
    for peer in chosen:
        for problem in problems:
            timer.time_peer(problem, peer)
        save(options.out, env, timer)
    failed = [r for r in timer.records if r.implementation == OURS and r.reason]
    for record in failed:
        print(f"FAILED {record.problem['name']}: {record.reason}")
    return 1 if failed else 0


def save(folder: Path, env: Mapping[str, Any], timer: Timer) -> None:
    harness.add_ratios(timer.records, OURS)
    harness.save(folder / "layers.json", env, timer.records, ceilings=dict(timer.limits))


# What was found


def report(options: argparse.Namespace) -> int:
    path = options.out / "layers.json"
    if not path.exists():
        print("No layer was timed.")
        return 1
    data = harness.load(path)
    limits = data["ceilings"]
    print(f"{data['environment']['device']}: copy {limits['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
          f"bf16 product {limits['bf16_flops_per_s'] / 1e12:.0f} TFLOP/s")  # fmt: skip
    cells: dict[tuple[str, int, str], dict[str, dict]] = {}
    for record in data["records"]:
        key = (record["problem"]["name"], record["problem"]["batch"], record["pass"])
        cells.setdefault(key, {})[record["implementation"]] = record
    names = [name for name in PEERS if any(name in cell for cell in cells.values())]
    rows = [row(key, cell, names) for key, cell in cells.items()]
    print(harness.table(["us", OURS, "graph", "of floor", *(f"x {name}" for name in names)], rows))
    print_means(cells, names)
    reasons = {(r["implementation"], r["reason"]) for r in data["records"] if r["reason"]}
    for name, reason in sorted(reasons):
        print(f"- {name}: {reason}")
    if "H200" in data["environment"]["device"]:
        print_targets(cells)
    return 0


def row(key: tuple[str, int, str], cell: Mapping[str, dict], names: Sequence[str]) -> list[str]:
    def us(name: str) -> str:
        timing = cell.get(name, {}).get("ms")
        return f"{1e3 * timing['median']:.1f}" if timing else "-"

    mine = cell.get(OURS, {})
    fraction = mine.get("work", {}).get("fraction_of_floor")
    ratios = mine.get("ratios", {})
    shown = [f"{ratios[name]:.2f}" if name in ratios else "-" for name in names]
    return [f"{key[0]} b{key[1]} {key[2]}", us(OURS), us(f"{OURS} graph"), f"{fraction:.0%}" if fraction else "-",
            *shown]  # fmt: skip


def print_means(cells: Mapping[tuple[str, int, str], Mapping[str, dict]], names: Sequence[str]) -> None:
    for name in names:
        ratios = [r for cell in cells.values() if (r := cell.get(OURS, {}).get("ratios", {}).get(name))]
        if ratios:
            slower = sum(r < 1 for r in ratios)
            mean = harness.geometric_mean(ratios)
            print(f"{name}: {mean:.2f}x our time in geometric mean of {len(ratios)} cells, faster in {slower}")


def print_targets(cells: Mapping[tuple[str, int, str], Mapping[str, dict]]) -> None:
    for pass_, targets in TARGETS.items():
        for layer, target in zip(("224/56x56-d8", "224/56x56-d1"), targets, strict=True):
            timing = cells.get((f"dinat_mini@224:{layer}", 128, pass_), {}).get(OURS, {}).get("ms")
            if timing:
                state = "met" if timing["median"] <= target else "MISSED"
                print(f"{layer} {pass_}: {1e3 * timing['median']:.1f} us, target {1e3 * target:.0f}: {state}")


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200]


PARTS = {"check": check, "small": small, "time": time_layers, "report": report}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dinat_triton.bench.gpu", description="Checks and times the Triton backend.")
    parser.add_argument("part", choices=(*PARTS, "where"))
    parser.add_argument("--out", type=Path, help="folder of the results (default: bench/results/<device>)")
    parser.add_argument("--budget", type=float, default=120, help="seconds after which no more is begun (default: 120)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in the interpreter, with tiny layers")
    options = parser.parse_args(arguments)
    options.device = torch.device("cpu" if options.dry_run else "cuda")
    if not options.dry_run and not torch.cuda.is_available():
        print("bench.gpu: torch sees no GPU; --dry-run tries everything on the CPU", file=sys.stderr)
        return 2
    options.out = options.out or harness.default_path(options.device, "gpu").parent
    if options.part == "where":
        print(options.out)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    return PARTS[options.part](options)


if __name__ == "__main__":
    sys.exit(main())
