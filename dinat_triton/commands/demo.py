"""`dinat-triton demo`: what runs on this machine, whether it is right, and how fast it is."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from tqdm import tqdm

from dinat_triton.dispatch import NAMES, why_not
from dinat_triton.functional import na2d

# A DiNAT-Mini layer each: what it is, map, heads, dilation. Head dim 32, kernel 7.
LAYERS = (
    ("stage 1, local", 56, 2, 1),
    ("stage 1, dilated", 56, 2, 8),
    ("stage 2, dilated", 28, 4, 4),
    ("stage 3, dilated", 14, 8, 2),
)
KERNEL, DIM = 7, 32
# Float32 against float64: far above rounding, far below any mistake.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class DemoTensors:
    """Query, key, value and bias of a layer, and the gradient of its output."""

    tensors: tuple[Tensor, ...]
    grad: Tensor
    dilation: int

    def to(self, **options) -> DemoTensors:
        tensors = tuple(x.detach().to(**options).requires_grad_() for x in self.tensors)
        return DemoTensors(tensors, self.grad.to(**options), self.dilation)

    def forward(self, backend: str) -> Tensor:
        query, key, value, rpb = self.tensors
        return na2d(query, key, value, KERNEL, dilation=self.dilation, rpb=rpb, backend=backend)

    def forward_backward(self, backend: str) -> tuple[Tensor, ...]:
        out = self.forward(backend)
        return (out.detach(), *torch.autograd.grad(out, self.tensors, self.grad))


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=1, help="images at a time (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    for name in ("batch", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backends = _describe(device)
    print(
        f"\nDiNAT-Mini layers, kernel {KERNEL}, float32, batch {args.batch}. Error: the largest relative error of the"
    )
    print("output and of all gradients, relative positional bias included, against the reference in float64.\n")
    rows: list[tuple[str, ...]] = []
    worst = 0.0
    for title, size, heads, dilation in tqdm(LAYERS, "layers", disable=None):
        inputs = _inputs(args.batch, size, heads, dilation, device)
        exact = inputs.to(dtype=torch.float64).forward_backward("reference")
        for backend in backends:
            error = max(_relative(a, b) for a, b in zip(inputs.forward_backward(backend), exact, strict=True))
            with torch.no_grad():
                forward = _time(partial(inputs.forward, backend), args.repeats, device)
            both = _time(partial(inputs.forward_backward, backend), args.repeats, device)
            rows.append(
                (title, f"{size}x{size}", str(dilation), backend, f"{error:.1e}", f"{forward:.2f}", f"{both:.2f}")
            )
            worst = max(worst, error)
    _table(("layer", "map", "dilation", "backend", "error", "forward ms", "+ backward ms"), rows)
    if not worst < TOLERANCE:
        print(f"\nFAILED: the largest error is {worst:.1e}, allowed are {TOLERANCE:.0e}", file=sys.stderr)
        return 1
    print(f"\nAll right: every backend agrees with float64 to {worst:.1e}.")
    return 0


def _describe(device: torch.device) -> list[str]:
    """Prints the machine and its backends, and returns those that can run."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    print(f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"{torch.get_num_threads()} CPU threads, {gpu}\n\nBackends")
    probe = torch.empty(1, KERNEL, KERNEL, 1, DIM, device=device)
    reasons = {name: why_not(name, probe, probe, probe) for name in NAMES}
    for name, reason in reasons.items():
        print(f"  {name:<10} {'runs' if reason is None else 'cannot run here: ' + reason}")
    return [name for name, reason in reasons.items() if reason is None]


def _inputs(batch: int, size: int, heads: int, dilation: int, device: torch.device) -> DemoTensors:
    generator = torch.Generator().manual_seed(size + dilation)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    maps = [draw(batch, size, size, heads, DIM) for _ in range(4)]
    return DemoTensors((*maps[:3], draw(heads, 2 * KERNEL - 1, 2 * KERNEL - 1)), maps[3].detach(), dilation)


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def _time(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median milliseconds."""
    times = []
    for _ in range(repeats + 2):
        start = perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (perf_counter() - start))
    return median(times[2:])


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, tuple("-" * w for w in widths), *rows]:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
