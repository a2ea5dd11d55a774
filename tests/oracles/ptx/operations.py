"""What threads and warps do: arithmetic, loads and stores, exchanges."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import numpy as np
from einops import rearrange

from tests.oracles.ptx.language import TYPES, Address, Instruction, Operand
from tests.oracles.ptx.machine import LANES, Machine, operation
from tests.oracles.ptx.memory import Array

# The bits of a float32 that matrix products of tf32 look at.
TF32 = 0xFFFFE000


# Arithmetic.

ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "neg": np.negative, "min": np.fmin, "max": np.fmax, "ex2": np.exp2,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
}  # fmt: skip


@operation(*ELEMENTWISE)
def elementwise(machine: Machine, instruction: Instruction, to: str, *sources: Operand) -> None:
    values = [machine.read(x, instruction.type) for x in sources]
    compute = ELEMENTWISE[instruction.operation]
    machine.write(to, compute(*values) if len(values) == 1 else reduce(compute, values))


@operation("mul", "mad", "fma")
def multiply(machine: Machine, instruction: Instruction, to: str, a: Operand, b: Operand, c: Operand = 0) -> None:
    form, source = instruction.parts[1], instruction.parts[-1]
    if source in HALVES:  # whose products are added to a float
        kind = "f4"
        x, y = (HALVES[source].decode(machine.read(each, "u2")) for each in (a, b))
    else:
        kind = instruction.type
        x, y = (machine.read(each, kind) for each in (a, b))
    exact = f"{kind[0]}8"  # the product, and so a float's sum rounds once
    result = x.astype(exact) * y.astype(exact)
    if form == "hi":
        result >>= 32
    if form == "wide":
        kind = f"{kind[0]}{2 * int(kind[1])}"
    machine.write(to, (result + machine.read(c, kind).astype(exact)).astype(kind))


@operation("div", "rem")
def divide(machine: Machine, instruction: Instruction, to: str, a: Operand, b: Operand) -> None:
    x, y = machine.read(a, instruction.type), machine.read(b, instruction.type)
    if instruction.type == "f4":
        machine.write(to, x / y)
        return
    quotient = (np.sign(x) * np.sign(y) * (np.abs(x) // np.maximum(np.abs(y), 1))).astype(instruction.type)
    machine.write(to, quotient if instruction.operation == "div" else x - quotient * y)


@operation("shl", "shr")
def shift(machine: Machine, instruction: Instruction, to: str, a: Operand, by: Operand) -> None:
    x = machine.read(a, instruction.type)
    bits = 8 * x.itemsize
    by = np.minimum(machine.read(by, "u4"), bits).astype(x.dtype)
    half = by // 2  # numpy does not shift by all bits at once
    by = by - half
    machine.write(to, x << half << by if instruction.operation == "shl" else x >> half >> by)


@operation("bfe")
def extract(machine: Machine, instruction: Instruction, to: str, a: Operand, first: int, length: int) -> None:
    x = machine.read(a, instruction.type)
    bits = 8 * x.itemsize
    machine.write(to, x << (bits - first - length) >> (bits - length))


@operation("prmt")
def permute_bytes(machine: Machine, instruction: Instruction, to: str, a: Operand, b: Operand, chosen: int) -> None:
    given = np.stack([machine.read_for(machine.threads, x, "u4") for x in (a, b)], -1).view("u1")
    taken = np.stack([given[:, chosen >> shift & 7] for shift in (0, 4, 8, 12)], -1)
    machine.write(to, taken.view("u4")[:, 0])


@operation("setp")
def compare(machine: Machine, instruction: Instruction, to: str, a: Operand, b: Operand) -> None:
    x, y = (machine.read(x, instruction.type) for x in (a, b))
    how = instruction.parts[1]
    machine.write(to, (x == x) & (y == y) if how == "num" else getattr(operator, how)(x, y))


@operation("selp")
def select(machine: Machine, instruction: Instruction, to: str, a: Operand, b: Operand, predicate: Operand) -> None:
    values = (machine.read(x, instruction.type) for x in (a, b))
    machine.write(to, np.where(machine.read(predicate, "?"), *values))


@operation("mov")
def move(machine: Machine, instruction: Instruction, to: Operand, source: Operand) -> None:
    """From register to register, or between one and its parts."""
    kind = np.dtype(instruction.type)
    if isinstance(to, list):
        parts = machine.read(source, kind.str)[:, None].view(f"u{kind.itemsize // len(to)}")
        for register, part in zip(to, parts.T, strict=True):
            if register != "_":
                machine.write(register, np.ascontiguousarray(part))
    elif isinstance(source, list):
        parts = [machine.read_for(machine.threads, x, f"u{kind.itemsize // len(source)}") for x in source]
        machine.write(to, np.stack(parts, -1).view(kind)[:, 0])
    else:
        machine.write(to, machine.read(source, kind.str))


@dataclass(frozen=True)
class Half:
    """A 16-bit float."""

    decode: Callable[[Array], Array]
    encode: Callable[[Array], Array]


def _encode_bf16(x: Array) -> Array:
    bits = x.view("u4")
    nearest = bits + 0x7FFF + (bits >> 16 & 1) >> 16
    return np.where(np.isnan(x), 0x7FFF, nearest).astype("u2")


HALVES = {
    "f16": Half(lambda bits: bits.view("f2").astype("f4"), lambda x: x.astype("f2").view("u2")),
    "bf16": Half(lambda bits: (bits.astype("u4") << 16).view("f4"), _encode_bf16),
}


@operation("cvt")
def convert(machine: Machine, instruction: Instruction, to: str, *sources: Operand) -> None:
    target, kind = instruction.parts[-2:]
    if target == "tf32":
        machine.write(to, machine.read(*sources, "u4") + 0x1000 & TF32)
        return
    if kind in HALVES:
        values = [HALVES[kind].decode(machine.read(x, "u2")) for x in sources]
    else:
        values = [machine.read(x, TYPES[kind]) for x in sources]
        values = [x[:: max(1, x.size // len(machine.threads))] for x in values]  # the low part of a wider register
    if target.endswith("x2"):
        high, low = (HALVES[target[:-2]].encode(x).astype("u4") for x in values)
        machine.write(to, high << 16 | low)
    else:
        machine.write(to, HALVES[target].encode(*values) if target in HALVES else values[0].astype(TYPES[target]))


# Memory.


@operation("ld")
def load(machine: Machine, instruction: Instruction, to: Operand, address: Address) -> None:
    space, kind = instruction.parts[1], np.dtype(instruction.type)
    if space == "param":
        machine.write(to, machine.parameters[str(address.base)].view(kind))
        return
    registers = to if isinstance(to, list) else [to]
    threads = machine.threads[machine.running]
    memory, at, who = machine.find(space, address, kind.itemsize * len(registers), threads)
    for i, register in enumerate(registers):
        machine.write_for(threads, register, memory.load(at // kind.itemsize + i, kind.str, who))


@operation("st")
def store(machine: Machine, instruction: Instruction, address: Address, source: Operand) -> None:
    space, kind = instruction.parts[1], np.dtype(instruction.type)
    sources = source if isinstance(source, list) else [source]
    threads = machine.threads[machine.running]
    memory, at, who = machine.find(space, address, kind.itemsize * len(sources), threads)
    for i, x in enumerate(sources):
        values = machine.read_for(threads, x, "u2" if kind.itemsize == 1 else kind.str).astype(kind)
        memory.store(at // kind.itemsize + i, kind.str, who, values)


@operation("cp")
def copy(machine: Machine, instruction: Instruction, *operands: Operand) -> None:
    """From global to shared memory, beside the threads."""
    threads, form = machine.threads[machine.running], instruction.parts[2]
    if form == "commit_group":
        machine.copies.commit(threads)
    elif form == "wait_group":
        for owner, place, words in machine.copies.wait(threads, machine.copies.committed[threads] - operands[0]):
            for i, word in enumerate(words.T):
                machine.shared.store(place + i, "u4", machine.warp[owner], word)
                machine.shared.unfenced.view("u4")[place + i] = 0  # which only threads' own stores need
    else:
        to, source, width, taken = operands
        _, at, _ = machine.find("shared", to, width, threads)
        taken = machine.read_for(threads, taken, "u4")
        if not np.isin(taken, (0, width)).all():
            raise NotImplementedError("copies of less than their width")
        words = np.zeros((len(threads), width // 4), "u4")
        memory, of, who = machine.find("global", source, width, threads[taken > 0])
        for i in range(width // 4):
            words[taken > 0, i] = memory.load(of // 4 + i, "u4", who)
        machine.copies.begin(threads, at // 4, words)


# What threads do together.


@operation("bar", "barrier")
def barrier(machine: Machine, instruction: Instruction, *operands: Operand) -> None:
    if instruction.parts[1] != "warp":
        programs = machine.together(machine.kernel.threads)
        machine.shared.pass_barrier(machine.program[programs[:, 0]])


@operation("fence")
def fence(machine: Machine, instruction: Instruction) -> None:
    """For matrix units; to threads memory is always in order here."""
    machine.shared.pass_fence(machine.program[machine.running])


@operation("shfl")
def shuffle(machine: Machine, instruction: Instruction, to: str, source: str, by: Operand, *_: int) -> None:
    warps, lane = machine.together(LANES), np.arange(LANES)
    by = machine.read_for(warps, by, "u4")
    others = {"bfly": lane ^ by, "idx": by}[instruction.parts[2]] % LANES
    machine.write_for(warps, to, np.take_along_axis(machine.read(source, "u4")[warps], others.astype(int), 1))


@operation("redux")
def reduce_lanes(machine: Machine, instruction: Instruction, to: str, source: str, _: int) -> None:
    warps, compute = machine.together(LANES), ELEMENTWISE[instruction.parts[2]]
    values = reduce(compute, machine.read(source, instruction.type)[warps].T)
    machine.write_for(warps, to, np.repeat(values[:, None], LANES, 1))


@operation("ldmatrix", "stmatrix")
def move_matrices(machine: Machine, instruction: Instruction, first: Operand, second: Operand) -> None:
    """Matrices of 8 x 8 halves: lanes know where the rows lie, and hold two neighbors each, of a row or of a column."""
    loads, warps = instruction.operation == "ldmatrix", machine.together(LANES)
    registers, address = (first, second) if loads else (second, first)
    _, at, _ = machine.find("shared", address, 16, warps[:, : 8 * len(registers)])
    place = rearrange(at // 2, "w (matrix row) -> matrix w row 1", row=8) + np.arange(8)
    warp = np.broadcast_to(machine.warp[warps[:, :1, None]], place.shape)
    lie = "(t e) g" if "trans" in instruction.parts else "g (t e)"
    if loads:
        pairs = rearrange(machine.shared.load(place, "u2", warp), f"matrix w {lie} -> matrix w (g t) e", t=4, e=2)
        for register, pair in zip(registers, np.ascontiguousarray(pairs).view("u4")[..., 0], strict=True):
            machine.write_for(warps, register, pair)
    else:
        pairs = np.stack([machine.read(x, "u4")[warps] for x in registers])[..., None].view("u2")
        machine.shared.store(place, "u2", warp, rearrange(pairs, f"matrix w (g t) e -> matrix w {lie}", t=4))
