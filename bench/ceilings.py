"""What a device allows at most: bytes copied, operations of matrix products and exponentials, each per second.

`measure_ceilings` measures them here, `ceilings_of` takes a named GPU's from its vendor, `ceilings_in` those that a
result file holds. All three give the same dictionary, and its `source` says which of them it was:

    source                 where the numbers are from
    device                 what they are of
    copy_bytes_per_s       of a large copy, read and written counted each
    product_flops_per_s    of a large matrix product, by dtype: float32 (ieee, never tf32) and bfloat16
    exps_per_s             float32 exponentials of arguments that lie in registers, or in the nearest cache
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from dinat_triton.bench import harness
from dinat_triton.bench.selection import find_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Bytes that no cache holds, and matrices whose product no overhead bothers.
COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}
SIDE = {"cpu": 2048, "cuda": 8192}
# Enough of them that starting the threads is little, few enough that a core's second cache holds them.
EXPS_PER_THREAD = 1 << 17
BUDGET = 0.5


def measure_ceilings(device: str | torch.device) -> dict[str, Any]:
    """Measures a device, in about three seconds.

    Args:
        device: "cpu" or a GPU, such as "cuda" or "cuda:1".
    """
    device = find_device(str(device))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), full_float32():
        return {
            "source": "measured",
            "device": harness.device_name(device),
            "copy_bytes_per_s": copy_rate(device),
            "product_flops_per_s": {name: product_rate(device, dtype) for name, dtype in DTYPES.items()},
            "exps_per_s": exp_rate(device),
        }


def ceilings_of(arch: str) -> dict[str, Any]:
    """What the vendor says of an architecture's largest common GPU; of its memory nine tenths, as copies reach."""
    from dinat_triton.offline.targets import find_target

    target = find_target(arch)
    return {
        "source": "vendor's figures, not measured",
        "device": f"{target.gpu} ({target.name})",
        "copy_bytes_per_s": target.memory,
        "product_flops_per_s": {"float32": target.products32, "bfloat16": target.products},
        "exps_per_s": target.exps,
    }


def ceilings_in(path: Path) -> dict[str, Any] | None:
    """The ceilings that a result file holds, or None."""
    found = harness.load(path).get("ceilings")
    if found is not None:
        check(found, path.name)
    return found


def check(found: Mapping[str, Any], where: str) -> None:
    """Refuses ceilings that are not complete and positive."""
    products = found.get("product_flops_per_s")
    numbers = [found.get("copy_bytes_per_s"), found.get("exps_per_s")]
    numbers += [products.get(name) for name in DTYPES] if isinstance(products, Mapping) else [None]
    if not all(isinstance(n, (int, float)) and n > 0 for n in numbers):
        raise ValueError(f"the ceilings of {where} must hold positive rates of copies, products and exponentials")


def copy_rate(device: torch.device) -> float:
    """Bytes per second, those read and those written."""
    size = COPIED[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product, an addition and a multiplication counted each."""
    side = SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / seconds(lambda: torch.mm(a, b, out=out), device)


def exp_rate(device: torch.device) -> float:
    """Exponentials per second: torch's own on a CPU, on a GPU those of a kernel that computes nothing else."""
    if device.type == "cuda":
        from dinat_triton.bench import exps

        x, out = exps.tensors(device)
        return exps.launch(x, out) / seconds(lambda: exps.launch(x, out), device)
    x = torch.linspace(-8, 0, EXPS_PER_THREAD * torch.get_num_threads())
    out = torch.empty_like(x)
    return x.numel() / seconds(lambda: torch.exp(x, out=out), device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """What one call in five does not take: a ceiling is reached in the good moments of a machine."""
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
