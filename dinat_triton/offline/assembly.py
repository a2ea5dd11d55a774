"""Registers, spills, matrix instructions, loads and loops of a compiled kernel, read out of its assembly."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

# In the PTX of NVIDIA, in the assembly of AMD.
MATRIX = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma\b",
    "mma.sync": r"\bmma\.sync",
    "mfma": r"\bv_mfma",
    "wmma": r"\bv_wmma",
}


def read(asm: dict[str, Any], is_amd: bool) -> dict[str, Any]:
    """Fields of `inspect.Report` that the compiler's output tells."""
    return _read_amd(asm) if is_amd else _read_nvidia(asm)


def _read_nvidia(asm: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        code = _sass_code(_cuobjdump("-sass", cubin))
    ptx = asm["ptx"]
    widths = [_ptx_bytes(m) for m in re.findall(r"\bld\.global(\S*)", ptx)]
    widths += [int(n, 0) for n in re.findall(r"cp\.async\.c[ag]\S* \[[^\]]*\], \[[^\]]*\], (\w+)", ptx)]
    return {
        "registers": int(_first(r"REG:(\d+)", usage)),
        "spills": int(_first(r"STACK:(\d+)", usage)),
        "matrix": _matrix(ptx),
        "loads": dict(sorted(Counter(widths).items())),
        "unset": unset(code.instructions),
        **loop_lengths(code, r"MUFU\.EX2"),
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
        "unset": [],
        **loop_lengths(_amd_code(text), r"v_exp_f32"),
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


def unset(instructions: Sequence[str]) -> list[str]:
    """Uniform registers that are read, such as for a matrix product's operands, where nothing before has written them.

    That is a mistake of ptxas, which 12.8 makes in rare kernels that keep everything in registers and spill: it carries
    a value from one round of a loop to the next and gives the first round none.
    """
    written: set[int] = set()
    found: list[str] = []
    for text in instructions:
        name, *operands = re.sub(r"^@!?U?P\w+ ", "", text).replace(",", " ").split()
        target = _target(name, operands)
        if name == "MOV.SPILL":  # puts aside whatever is there, and FILL puts it back
            continue
        for first, count in (each for x in operands[target:] for each in _uniform(name, x, operands)):
            found += [f"UR{n}" for n in range(first, first + count) if n not in written]
        if target:
            count = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
            first = int(operands[target - 1][2:])
            written.update(range(first, first + count))
    return list(dict.fromkeys(found))


def _target(name: str, operands: Sequence[str]) -> int:
    """Number of operands up to the uniform register that is written, behind predicates; 0 if none is."""
    if name.startswith(("U", "R2UR", "S2UR", "LDCU", "VOTEU", "REDUX", "CREDUX")):
        place = next((i for i, x in enumerate(operands) if not re.fullmatch(r"!?U?P(T|\d)", x)), 0)
        if operands and re.fullmatch(r"UR\d+", operands[place]):
            return place + 1
    return 0


def _uniform(name: str, operand: str, operands: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Uniform registers of an operand: the first and their number."""
    for kind, number in re.findall(r"(gdesc\[|\bdesc\[|)UR(\d+)", operand):
        first = int(number)
        if kind == "gdesc[" and name.startswith("HGMMA"):  # descriptors of rows, which may be in registers, and columns
            yield (first + 2, 2) if operands[1].startswith("R") else (first, 4)
        else:
            yield first, 2 if kind or name.startswith("UIADD3.64") else 1


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


def loop_lengths(code: Code, exp: str) -> dict[str, int]:
    """Exponentials and instructions of the loop over chunks, and of the loop over batch items around it."""
    hits = [i for i, text in enumerate(code.instructions) if re.search(exp, text)]

    def count(loop: tuple[int, int]) -> int:
        return sum(loop[0] <= i <= loop[1] for i in hits)

    def length(loop: tuple[int, int]) -> int:
        return loop[1] + 1 - loop[0]

    # Two branches back to the same place are one loop.
    last = {first: max(end for start, end in code.loops if start == first) for first, _ in code.loops}
    loops = sorted((loop for loop in last.items() if count(loop)), key=length)
    inner = loops[0] if loops else (0, len(code.instructions) - 1)
    around = [loop for loop in loops[1:] if loop[0] <= inner[0] and inner[1] <= loop[1]]
    outer = around[0] if around else inner
    return {"exps": count(inner), "chunk_length": length(inner), "item_length": length(outer) - length(inner)}
