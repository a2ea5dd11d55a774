"""The most that a device does per second, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dinat_triton.bench import harness
from dinat_triton.work import Ceilings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Bytes that no cache holds, and matrices whose product no overhead bothers.
COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}
SIDE = {"cpu": 2048, "cuda": 8192}
# Enough of them that starting the threads is little, few enough that a core's second cache holds them.
EXPS_PER_THREAD = 1 << 17
BUDGET = 0.5


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measures a device, in about three seconds."""
    with full_float32():
        products = {name: product_rate(device, dtype) for name, dtype in DTYPES.items()}
        source = "measured" if device.type == "cpu" else "measured, exponentials the vendor's"
        return Ceilings(source, harness.device_name(device), copy_rate(device), products, exp_rate(device))


def copy_rate(device: torch.device) -> float:
    """Bytes per second, those read and those written."""
    size = COPIED[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product."""
    side = SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / seconds(lambda: torch.mm(a, b, out=out), device)


def exp_rate(device: torch.device) -> float:
    """Exponentials per second: measured on a CPU, a GPU's by its vendor's figures."""
    if device.type == "cuda":
        from dinat_triton.kernels.configs import architecture_of
        from dinat_triton.offline.targets import target_of

        return target_of(architecture_of(device)).exps
    x = torch.linspace(-8, 0, EXPS_PER_THREAD * torch.get_num_threads())
    out = torch.empty_like(x)
    return x.numel() / seconds(lambda: torch.exp(x, out=out), device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """20th-percentile seconds of a call: a ceiling is reached in the good moments of a machine."""
    call()
    return harness.measure_on(device, {"": call}, BUDGET)[""].p20 / 1e3


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 products in float32, whatever the process chose."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
