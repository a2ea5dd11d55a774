"""Compiles the kernels for a GPU that need not be there, and reads what came out.

What is compiled are the real launches: the backend runs on tensors without memory, and Triton is stopped where it would
compile. So there is no second description of the arguments that could differ from the first.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.compiler import ASTSource
from triton.runtime import driver

from dinat_triton.kernels import attention, prepare, schedule
from dinat_triton.kernels.backward import (
    closed_backward_kernel,
    fold_bias_kernel,
    key_backward_kernel,
    query_backward_kernel,
    sum_programs_kernel,
)
from dinat_triton.kernels.forward import forward_kernel
from dinat_triton.kernels.primitives import table_kernel
from dinat_triton.layers import Layer
from dinat_triton.offline.targets import Target

# Those that multiply and compute exponentials, and those that only move numbers about.
EXP_KERNELS = (forward_kernel, closed_backward_kernel, query_backward_kernel, key_backward_kernel)
KERNELS = {k.__name__: k for k in (*EXP_KERNELS, table_kernel, sum_programs_kernel, fold_bias_kernel)}
# ptxas gives up a few of a thread's 255 registers to share a multiprocessor among more programs.
TOLERATED_SPILLS = 16
# In the PTX of NVIDIA, in the assembly of AMD.
MATRIX = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma\b",
    "mma.sync": r"\bmma\.sync",
    "mfma": r"\bv_mfma",
    "wmma": r"\bv_wmma",
}


@dataclass(frozen=True)
class Launch:
    """A kernel as Triton would compile it; `specialization` is Triton's own description of that."""

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
        """Compile-time arguments by name."""
        names = list(self.parts["signature"])
        return {names[path[0]]: v for path, v in zip(*self._mapping("constant"), strict=True) if v is not None}

    @property
    def takes_float32(self) -> bool:
        return self.parts["signature"].get("q") == "*fp32"

    @property
    def source(self) -> ASTSource:
        constants, attributes = (dict(zip(*self._mapping(x), strict=True)) for x in ("constant", "attrs"))
        return ASTSource(KERNELS[self.kernel], self.parts["signature"], constants, attributes)

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


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Collects the launches on tensors of the meta device instead of compiling them, as if on this GPU."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("the kernels are interpreted, so there is nothing to compile: unset TRITON_INTERPRET")
    launches: list[Launch] = []

    def stop(*, fn, compile, **_) -> bool:
        launches.append(Launch(fn.name, compile["specialization_data"]))
        return True

    previous = driver._active
    try:
        driver.set_active(_NoDriver(target))
        with (
            mock.patch.object(schedule, "architecture_of", return_value=target.architecture),
            mock.patch.object(torch.version, "hip", "offline" if target.is_amd else None),
            triton.knobs.runtime.scope(),
        ):
            triton.knobs.runtime.jit_cache_hook = stop
            prepare.forget()
            yield launches
    finally:
        driver.set_active(previous)
        prepare.forget()


def run_layer(layer: Layer, dtype: torch.dtype, batch: int, backward: bool = True) -> None:
    """A training step's attention on a packed qkv of the meta device."""
    qkv = torch.empty(batch, *layer.shape, 3, layer.heads, layer.dim, device="meta", dtype=dtype)
    rpb = torch.empty(layer.heads, *layer.geometry.bias_shape, device="meta", dtype=dtype)
    scale = layer.dim**-0.5
    out, lse = attention.forward([qkv], rpb, None, layer.geometry, scale, 0.0, True)
    if backward:
        attention.backward([qkv], rpb, None, out, lse, out, None, layer.geometry, scale, 0.0, [torch.empty_like(qkv)])


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    return list(dict.fromkeys(launches))


@dataclass(frozen=True)
class Report:
    """What a compiled kernel needs and does.

    Attributes:
        registers: Of a thread.
        spills: Bytes of a thread that went to memory instead (on AMD: registers).
        shared: Bytes of shared memory.
        matrix: Matrix instructions by kind.
        exps: Exponentials per thread in the innermost loop that has any.
        expected_exps: What they would be if every score were computed once.
        loads: Loads from global memory by their width in bytes.
        chunk_length: Instructions of the innermost loop with exponentials.
        item_length: Instructions of the loop around it, without it; 0 if that is all there is.
        chunk_exchange: Bytes that the innermost loop moves between a warp or its matrix unit and shared memory.
        item_exchange: And the loop around it.
        programs: That fit a multiprocessor.
    """

    launch: Launch
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
    chunk_exchange: float
    item_exchange: float
    programs: int
    complaints: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k != "launch"}
        options = {k: self.launch.options[k] for k in ("num_warps", "num_stages")}
        return {"kernel": self.launch.kernel, "constants": self.launch.constants, **options, **own}


def inspect(launch: Launch, target: Target) -> Report:
    """Compiles one launch and reads the result."""
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in launch.options.items()}
    compiled = triton.compile(launch.source, target=target.triton, options=options)
    read = _read_amd if target.is_amd else _read_nvidia
    found = read(compiled.asm)
    loops: dict[str, Any] = loop_lengths(found.pop("code"), found.pop("exp"))
    report = Report(
        launch=launch,
        target=target.name,
        shared=compiled.metadata.shared,
        expected_exps=_expected_exps(launch, target),
        programs=_programs(target, launch.options["num_warps"], found["registers"], compiled.metadata.shared),
        **found,
        **loops,
    )
    report.complaints.extend(complaints(report, target))
    return report


def complaints(report: Report, target: Target) -> list[str]:
    """Why a kernel must not ship, if it must not."""
    found = []
    if report.spills > TOLERATED_SPILLS:
        found.append(f"spills {report.spills} {'registers' if target.is_amd else 'bytes'}")
    if report.shared > target.shared:
        found.append(f"needs {report.shared} bytes of shared memory, {target.name} has {target.shared}")
    # A few more belong to rows, not to scores.
    if report.exps > 1.25 * report.expected_exps + 4:
        found.append(f"computes {report.exps} exponentials per thread instead of {report.expected_exps:g}")
    launch = report.launch
    wide = launch.constants.get("ROWS", 0) >= 64 and launch.options["num_warps"] >= 4 and not launch.takes_float32
    if target.name == "sm_90" and wide and report.expected_exps and not report.matrix.get("wgmma"):
        found.append("has no wgmma")
    return found


def _expected_exps(launch: Launch, target: Target) -> float:
    if KERNELS[launch.kernel] not in EXP_KERNELS:
        return 0
    threads = launch.options["num_warps"] * target.warp
    return launch.constants["ROWS"] * launch.constants["CHUNK"] / threads


def _programs(target: Target, warps: int, registers: int, shared: int) -> int:
    """Programs that a multiprocessor holds at once."""
    threads = warps * target.warp
    by_registers = target.registers // (threads * -(-max(registers, 1) // 8) * 8)
    # The driver keeps a kibibyte of shared memory per program for itself.
    by_shared = target.shared_total // (shared + 1024)
    return min(target.threads // threads, by_registers, by_shared, 32)


def _read_nvidia(asm: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        sass = _cuobjdump("-sass", cubin)
    ptx = asm["ptx"]
    widths = [_ptx_bytes(m) for m in re.findall(r"\bld\.global(\S*)", ptx)]
    widths += [int(n, 0) for n in re.findall(r"cp\.async\.c[ag]\S* \[[^\]]*\], \[[^\]]*\], (\w+)", ptx)]
    return {
        "registers": int(_first(r"REG:(\d+)", usage)),
        "spills": int(_first(r"STACK:(\d+)", usage)),
        "matrix": _matrix(ptx),
        "loads": dict(sorted(Counter(widths).items())),
        "code": _sass_code(sass),
        "exp": r"MUFU\.EX2",
    }


def _read_amd(asm: dict[str, Any]) -> dict[str, Any]:
    text = asm["amdgcn"]
    words = [int(n or 1) for n in re.findall(r"\b(?:global|buffer)_load_dword(?:x(\d))?\b", text)]
    words += [int(n) // 32 for n in re.findall(r"\b(?:global|buffer)_load_b(32|64|128)\b", text)]
    return {
        "registers": int(_first(r"\.vgpr_count:\s+(\d+)", text)),
        "spills": int(_first(r"\.vgpr_spill_count:\s+(\d+)", text)),
        "matrix": _matrix(text),
        "loads": dict(sorted(Counter(4 * n for n in words).items())),
        "code": _amd_code(text),
        "exp": r"v_exp_f32",
    }


def _matrix(text: str) -> dict[str, int]:
    counts = {kind: len(re.findall(pattern, text)) for kind, pattern in MATRIX.items()}
    return {kind: n for kind, n in counts.items() if n}


def _ptx_bytes(suffixes: str) -> int:
    lanes = re.search(r"\.v(\d)", suffixes)
    bits = re.search(r"\.[bsuf](\d+)", suffixes)
    return (int(lanes[1]) if lanes else 1) * (int(bits[1]) if bits else 32) // 8


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's report has no {pattern!r}")
    return found[1]


def _cuobjdump(option: str, path: Path) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Code:
    """A kernel's instructions, and its branches backward as (first, last) instruction of a loop."""

    instructions: list[str]
    loops: list[tuple[int, int]]


def _sass_code(sass: str) -> Code:
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    at = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    loops = []
    for i, (_, text) in enumerate(lines):
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        first = at.get(int(target[1], 16)) if target else None
        if first is not None and first < i:
            loops.append((first, i))
    return Code([text for _, text in lines], loops)


def _amd_code(text: str) -> Code:
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(instructions)
        elif re.match(r"\t[a-z]", line):
            jump = re.match(r"\ts_c?branch\w*\s+(\.LBB\w+)", line)
            if jump and jump[1] in labels:
                loops.append((labels[jump[1]], len(instructions)))
            instructions.append(line.strip())
    return Code(instructions, loops)


def loop_lengths(code: Code, exp: str) -> dict[str, float]:
    """Exponentials, instructions and exchange of the loop over chunks, and of the loop over batch items around it."""
    hits = [i for i, text in enumerate(code.instructions) if re.search(exp, text)]
    exchanged = [0.0, *accumulate(map(exchange, code.instructions))]

    def count(loop: tuple[int, int]) -> int:
        return sum(loop[0] <= i <= loop[1] for i in hits)

    def size(loop: tuple[int, int]) -> tuple[int, float]:
        return loop[1] + 1 - loop[0], exchanged[loop[1] + 1] - exchanged[loop[0]]

    # Two branches back to the same place are one loop.
    last = {first: max(end for start, end in code.loops if start == first) for first, _ in code.loops}
    loops = sorted((loop for loop in last.items() if count(loop)), key=lambda loop: loop[1] - loop[0])
    inner = loops[0] if loops else (0, len(code.instructions) - 1)
    around = [loop for loop in loops[1:] if loop[0] <= inner[0] and inner[1] <= loop[1]]
    length, moved = size(inner)
    outer_length, outer_moved = size(around[0]) if around else (length, moved)
    return {
        "exps": count(inner),
        "chunk_length": length,
        "item_length": outer_length - length,
        "chunk_exchange": moved,
        "item_exchange": outer_moved - moved,
    }


def exchange(instruction: str) -> float:
    """Bytes that a warp's instruction moves between its registers or matrix unit and shared memory; NVIDIA's alone."""
    if product := re.search(r"\bHGMMA\.64x(\d+)x\d+\S* R\d+, (R|gdesc)", instruction):
        # Of each row and column 32 bytes, for four warps; the rows may come from registers.
        return (int(product[1]) + (64 if product[2] == "gdesc" else 0)) * 32 / 4
    if matrices := re.search(r"\b(?:LDSM|STSM)\.\S*?88(?:\.([24]))?\b", instruction):
        return 128 * int(matrices[1] or 1)
    if word := re.search(r"\b(?:LDS|STS)(?:\.(64|128))?\b", instruction):
        return 4 * int(word[1] or 32)
    return 0
