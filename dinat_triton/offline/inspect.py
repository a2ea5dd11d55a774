"""Compiles the kernels for a GPU that need not be there, and reads what came out.

What is compiled are the real launches: the backend runs on tensors without memory, and Triton is stopped where it would
compile. So there is no second description of the arguments that could differ from the first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import triton
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import convert_to_tuple_if_list

from dinat_triton.kernels import attention
from dinat_triton.kernels.backward import (
    closed_backward_kernel,
    fold_bias_kernel,
    key_backward_kernel,
    query_backward_kernel,
    sum_programs_kernel,
)
from dinat_triton.kernels.configs import Config, Preset
from dinat_triton.kernels.forward import forward_kernel
from dinat_triton.kernels.primitives import table_kernel
from dinat_triton.layers import Layer
from dinat_triton.offline import assembly
from dinat_triton.offline.targets import Target

# Those that multiply and compute exponentials, and those that only move numbers about.
EXP_KERNELS = (forward_kernel, closed_backward_kernel, query_backward_kernel, key_backward_kernel)
KERNELS = {k.__name__: k for k in (*EXP_KERNELS, table_kernel, sum_programs_kernel, fold_bias_kernel)}
# What waiting for memory costs more than: on an H200 the closed backward takes 250 us without spills, and 157 with 72
# bytes of them and the next item's loads on their way.
TOLERATED_SPILLS = 96


@dataclass(frozen=True)
class KernelVariant:
    """A kernel as Triton would compile it for a launch; `specialization` is Triton's own description of that."""

    kernel: str
    specialization: str

    @property
    def name(self) -> str:
        return self.kernel.removesuffix("_kernel")

    @cached_property
    def parts(self) -> dict[str, Any]:
        return json.loads(self.specialization)

    @property
    def options(self) -> dict[str, Any]:
        return self.parts["options"]

    @cached_property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments by name, without what Triton made of strides."""
        names = list(self.parts["signature"])
        found = zip(*self._mapping("constant"), strict=True)
        return {names[path[0]]: v for path, v in found if len(path) == 1 and v is not None}

    @property
    def takes_float32(self) -> bool:
        return self.parts["signature"].get("q") == "*fp32"

    @property
    def source(self) -> ASTSource:
        constants, attributes = (dict(zip(*self._mapping(x), strict=True)) for x in ("constant", "attrs"))
        signature = {name: convert_to_tuple_if_list(kind) for name, kind in self.parts["signature"].items()}
        return ASTSource(KERNELS[self.kernel], signature, constants, attributes)

    def _mapping(self, name: str) -> tuple[list[tuple[int, ...]], list[Any]]:
        key = name if name == "attrs" else "constant"
        return [tuple(path) for path in self.parts[f"{key}_keys"]], self.parts[f"{key}_vals"]


class _NoDriver:
    """Passes for the driver of a GPU while kernels are only looked at."""

    def __init__(self, target: Target):
        self.target = target

    def get_current_device(self) -> str:
        return f"none, but {self.target.name}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self):
        return self.target.triton


def variants_of(
    layer: Layer, target: Target, dtype: torch.dtype, configs: tuple[Config, ...] = ()
) -> list[KernelVariant]:
    """Everything that a training step's attention launches, in order.

    Args:
        layer: The layer, on a packed qkv.
        target: The GPU.
        dtype: Dtype of all tensors.
        configs: Configs of the passes; by default those of the tables.
    """
    preset, geometry, scale = Preset(target.architecture, configs), layer.geometry, layer.dim**-0.5
    qkv = torch.empty(layer.batch, *layer.shape, 3, layer.heads, layer.dim, device="meta", dtype=dtype)
    rpb = None
    if layer.has_bias:
        rpb = torch.empty(layer.heads, *geometry.bias_shape, device="meta", dtype=dtype)
    with _recording(target) as variants:
        out, lse = attention.forward([qkv], rpb, None, geometry, scale, 0.0, True, preset)
        into: list[torch.Tensor | None] = [torch.empty_like(qkv)]
        attention.backward([qkv], rpb, None, out, lse, out, None, geometry, scale, 0.0, into, preset=preset)
    return variants


@contextmanager
def _recording(target: Target) -> Iterator[list[KernelVariant]]:
    """Collects what is launched instead of compiling it."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("the kernels are interpreted, so there is nothing to compile: unset TRITON_INTERPRET")
    variants: list[KernelVariant] = []

    def stop(*, fn, compile, **_) -> bool:
        variants.append(KernelVariant(fn.name, compile["specialization_data"]))
        return True

    with pretending(target), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = stop
        yield variants


@contextmanager
def pretending(target: Target) -> Iterator[None]:
    """Triton takes this GPU to be here."""
    previous = driver._active
    driver.set_active(_NoDriver(target))
    try:
        yield
    finally:
        driver.set_active(previous)


@dataclass(frozen=True)
class Report:
    """Needs and contents of a compiled kernel.

    Attributes:
        registers: Registers of a thread.
        spills: Bytes of a thread that went to memory instead (on AMD: registers).
        shared: Bytes of shared memory.
        matrix: Matrix instructions by kind.
        exps: Exponentials per thread in the innermost loop that has any.
        expected_exps: Exponentials per thread if every score were computed once.
        loads: Loads from global memory by their width in bytes.
        chunk_length: Instructions of the innermost loop with exponentials.
        item_length: Instructions of the loop around it, without it; 0 if that is all there is.
        programs: Programs that fit a multiprocessor.
        unset: Registers that are read where nothing has written them.
    """

    variant: KernelVariant
    target: str
    registers: int
    spills: int
    shared: int
    matrix: dict[str, int]
    exps: int
    expected_exps: float
    loads: dict[int, int]
    chunk_length: int
    item_length: int
    programs: int
    unset: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k != "variant"}
        options = {k: self.variant.options[k] for k in ("num_warps", "num_stages")}
        return {"kernel": self.variant.kernel, "constants": self.variant.constants, **options, **own}


def inspect(variant: KernelVariant, target: Target) -> Report:
    """Compiles a kernel and reads the result."""
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in variant.options.items()}
    compiled = triton.compile(variant.source, target=target.triton, options=options)
    found = assembly.read(compiled.asm, target.is_amd)
    report = Report(
        variant=variant,
        target=target.name,
        shared=compiled.metadata.shared,
        expected_exps=_expected_exps(variant, target),
        programs=_programs(target, variant.options["num_warps"], found["registers"], compiled.metadata.shared),
        **found,
    )
    report.complaints.extend(complaints(report, target))
    return report


def complaints(report: Report, target: Target) -> list[str]:
    """Reasons why a kernel must not ship."""
    found = []
    if report.spills > TOLERATED_SPILLS:
        found.append(f"spills {report.spills} {'registers' if target.is_amd else 'bytes'}")
    if report.unset:
        found.append(f"reads {', '.join(report.unset)}, which nothing has written: a mistake of the compiler")
    if report.shared > target.shared:
        found.append(f"needs {report.shared} bytes of shared memory, {target.name} has {target.shared}")
    # A few more belong to rows, not to scores.
    if report.exps > 1.25 * report.expected_exps + 4:
        found.append(f"computes {report.exps} exponentials per thread instead of {report.expected_exps:g}")
    variant = report.variant
    wide = variant.constants.get("ROWS", 0) >= 64 and variant.options["num_warps"] >= 4 and not variant.takes_float32
    if target.name == "sm_90" and wide and report.expected_exps and not report.matrix.get("wgmma"):
        found.append("has no wgmma")
    return found


def _expected_exps(variant: KernelVariant, target: Target) -> float:
    if KERNELS[variant.kernel] not in EXP_KERNELS:
        return 0
    threads = variant.options["num_warps"] * target.warp
    return variant.constants["ROWS"] * variant.constants["CHUNK"] / threads


def _programs(target: Target, warps: int, registers: int, shared: int) -> int:
    """Programs that a multiprocessor holds at once."""
    threads = warps * target.warp
    by_registers = target.registers // (threads * -(-max(registers, 1) // 8) * 8)
    # The driver keeps a kibibyte of shared memory per program for itself.
    by_shared = target.shared_total // (shared + 1024)
    return min(target.threads // threads, by_registers, by_shared, 32)
