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
    code, labels = _in_order(code, labels)
    return Kernel(
        threads=int(re.findall(r"\.reqntid (\d+)", head)[0]),
        parameters={name: TYPES[kind] for kind, name in re.findall(r"\.param \.(\w+)[^,)]*?(\w+)[,\n]", head)},
        registers={name: TYPES[kind] for kind, name in re.findall(r"\.reg \.(\w+)\s+(%?[a-z]+)[<;]", body)},
        code=code,
        labels=labels,
    )


def _in_order(code: list[Instruction], labels: dict[str, int]) -> tuple[list[Instruction], dict[str, int]]:
    """Puts blocks in an order in which loops alone jump back. Compilers lay rarely used ones out of the way."""
    jumps = [at + 1 for at, x in enumerate(code) if x.operation in ("bra", "ret")]
    starts = sorted({0, *labels.values(), *jumps} - {len(code)})
    ends = dict(zip(starts, [*starts[1:], len(code)], strict=True))

    def next_of(start: int) -> list[int]:
        """The block that a block falls through to, if it does."""
        last, end = code[ends[start] - 1], ends[start]
        return [end] if end < len(code) and (last.guard or last.operation not in ("bra", "ret")) else []

    def following(start: int) -> list[int]:
        """The blocks that a block leads to."""
        last = code[ends[start] - 1]
        return ([labels[last.operands[0]]] if last.operation == "bra" else []) + next_of(start)

    order: list[int] = []
    seen, path = {0}, [(0, iter(following(0)))]
    while path:  # a block stands before all that it leads to
        start, others = path[-1]
        to = next((x for x in others if x not in seen), None)
        if to is None:
            order.insert(0, start)
            path.pop()
        else:
            seen.add(to)
            path.append((to, iter(following(to))))

    moved: list[Instruction] = []
    places = {}
    for start, after in zip(order, [*order[1:], None], strict=True):
        places[start] = len(moved)
        moved += code[start : ends[start]]
        moved += [Instruction(["bra"], [f"block {x}"], None, "bra") for x in next_of(start) if x != after]
    names = {f"block {start}": at for start, at in places.items()}
    return moved, names | {name: places[at] for name, at in labels.items() if at in places}


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
