"""PTX, the assembly that Triton compiles to for NVIDIA GPUs, read into Python. Types are numpy's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

TYPES = {
    "pred": "?", "b8": "u1", "b16": "u2", "u16": "u2", "s16": "i2", "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4",
    "b64": "u8", "u64": "u8", "s64": "i8", "f32x2": "f4",
}  # fmt: skip


@dataclass(frozen=True)
class Address:
    base: str | int
    offset: int


# A name of a register, label or parameter; a number, or a float's bits; a place in memory; several of them.
Operand = Any


@dataclass(frozen=True)
class Instruction:
    """`guard` is the predicate that it runs under, and whether that must hold or must not."""

    parts: list[str]
    operands: list[Operand]
    guard: tuple[str, bool] | None
    text: str

    @property
    def operation(self) -> str:
        return self.parts[0]

    @property
    def type(self) -> str:
        return TYPES[self.parts[-1]]


@dataclass(frozen=True, eq=False)
class Kernel:
    """A compiled kernel: its instructions, and the one that each label stands before."""

    threads: int  # of a program
    parameters: dict[str, str]  # types by name, in order
    registers: dict[str, str]  # types by the first letters of a register's name
    code: list[Instruction]
    labels: dict[str, int]


@lru_cache(maxsize=256)
def parse(text: str) -> Kernel:
    """Reads a file of one kernel."""
    head, body = re.sub(r"//.*", "", text).split(".entry", 1)[1].split("\n{\n", 1)
    code: list[Instruction] = []
    labels = {}
    block = 0

    def label(name: str) -> str:
        """Those without a $ are known in their block alone."""
        return name if name[0] == "$" else f"{name} {block}"

    for line in map(str.strip, body.splitlines()):
        if line == "{":
            block += 1
        elif found := re.fullmatch(r"(\$?\w+):", line):
            labels[label(found[1])] = len(code)
        elif found := re.fullmatch(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*);", line):
            negated, predicate, name, operands = found.groups()
            parsed = [label(operands)] if name.startswith("bra") else _operands(operands)
            code.append(Instruction(name.split("."), parsed, (predicate, not negated) if predicate else None, line))
        elif line and line[0] not in ".}":
            raise NotImplementedError(line)
    return Kernel(
        threads=int(re.findall(r"\.reqntid (\d+)", head)[0]),
        parameters={name: TYPES[kind] for kind, name in re.findall(r"\.param \.(\w+)[^,)]*?(\w+)[,\n]", head)},
        registers={name: TYPES[kind] for kind, name in re.findall(r"\.reg \.(\w+)\s+(%?[a-z]+)[<;]", body)},
        code=code,
        labels=labels,
    )


def _operands(text: str) -> list[Operand]:
    """Split at the commas outside of brackets."""
    return [_operand(x.strip()) for x in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if x.strip()]


def _operand(text: str) -> Operand:
    if text[0] == "{":
        return _operands(text[1:-1])
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(_operand(base), int(offset or 0))
    if "|" in text:
        return [_operand(x) for x in text.split("|")]
    if text.startswith("0f"):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return 0 if text == "global_smem" else text  # all shared memory there is
