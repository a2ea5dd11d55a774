"""A machine for PTX: the threads of a launch in step, a register an array with a value for each of them.

It knows the instructions these kernels are made of and nothing more, and it is stricter than a GPU. What faults: an
access outside the tensors of the launch, a misaligned one, two programs that write one place, a barrier that a part of
a program does not reach, warps that meet in shared memory with no barrier in between, matrix units that read what
threads stored there without a fence. What runs beside the threads is not there before it is waited for, and what nobody
wrote reads as NaN.
"""

from __future__ import annotations

import ctypes
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from tests.oracles.ptx import TYPES, Address, Float, Instruction, Kernel, Operand

Array = NDArray[Any]

LANES = 32
# Enough in step to make numpy's own time per instruction small.
PROGRAMS_IN_STEP = 64
# The bits of a float32 that matrix products of tf32 look at.
TF32 = 0xFFFFE000
ENDED = np.iinfo(int).max


class Fault(Exception):
    """What a GPU would crash on, or do differently from run to run."""


def launch(kernel: Kernel, grid: tuple[int, int, int], shared: int, arguments: list[Any]) -> None:
    """Runs a kernel on the CPU's tensors, with so many bytes of shared memory per program."""
    tensors = [Global(x) for x in arguments if isinstance(x, Tensor)]
    values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    programs = prod(grid)
    for first in range(0, programs, PROGRAMS_IN_STEP):
        some = range(first, min(first + PROGRAMS_IN_STEP, programs))
        with np.errstate(all="ignore"):
            Machine(kernel, grid, some, shared, values, tensors).run()


class Memory:
    """Bytes, read and written as numbers of one type, at multiples of their size; `who` is a warp or a program."""

    def __init__(self, content: Array):
        self.bytes = content

    def numbers(self, kind: str) -> Array:
        return self.bytes[: len(self.bytes) - len(self.bytes) % np.dtype(kind).itemsize].view(kind)

    def load(self, place: Array, kind: str, who: Array) -> Array:
        return self.numbers(kind)[place]

    def store(self, place: Array, kind: str, who: Array, values: Array) -> None:
        self.numbers(kind)[place] = values


class Global(Memory):
    """A tensor's memory, and which program wrote what in it."""

    def __init__(self, tensor: Tensor):
        storage = tensor.untyped_storage()
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        super().__init__(np.frombuffer((ctypes.c_uint8 * self.size).from_address(self.start), "u1"))
        self.writers = np.full(self.size, -1)

    def store(self, place: Array, kind: str, who: Array, values: Array) -> None:
        first = place * np.dtype(kind).itemsize
        before = self.writers[first]
        self.writers[first] = who
        if ((before != -1) & (before != who)).any() or (self.writers[first] != who).any():
            raise Fault("two programs write one place")
        super().store(place, kind, who, values)


class Shared(Memory):
    """The shared memory of some programs, and which warps read and wrote each byte since the last barrier, as bits."""

    def __init__(self, programs: int, size: int):
        self.size = -(-max(size, 1) // 16) * 16
        super().__init__(np.full(programs * self.size, 0xFF, "u1"))
        self.readers, self.writers = np.zeros_like(self.bytes), np.zeros_like(self.bytes)
        self.unfenced = np.zeros_like(self.bytes)

    def load(self, place: Array, kind: str, who: Array) -> Array:
        for warp in np.unique(who):
            self._note(self.readers, place[who == warp], kind, warp, self.writers)
        return super().load(place, kind, who)

    def store(self, place: Array, kind: str, who: Array, values: Array) -> None:
        """Writing what is there already, as warps with the same work do, is no conflict."""
        for warp in np.unique(who):
            at, new = place[who == warp], values[who == warp]
            changes = super().load(at, kind, who) != new
            self._note(self.writers, at[changes], kind, warp, self.writers, self.readers)
            self._note(self.unfenced, at, kind, warp)
            super().store(at, kind, who, new)

    def pass_barrier(self, programs: Array) -> None:
        for notes in (self.readers, self.writers):
            notes.reshape(-1, self.size)[programs] = 0

    def pass_fence(self, programs: Array) -> None:
        self.unfenced.reshape(-1, self.size)[programs] = 0

    def _note(self, notes: Array, place: Array, kind: str, warp: int, *conflicting: Array) -> None:
        size = np.dtype(kind).itemsize
        mine = np.full(size, 1 << warp % 8, "u1").view(f"u{size}")[0]
        if any((x.view(mine.dtype)[place] & ~mine).any() for x in conflicting):
            raise Fault("warps meet in shared memory without a barrier")
        notes.view(mine.dtype)[place] |= mine


class Groups:
    """Work that runs beside the threads, until a thread waits for the group that it belongs to."""

    def __init__(self, threads: int):
        self.committed = np.zeros(threads, int)
        self.running: list[tuple[Array, Array, tuple[Array, ...]]] = []

    def begin(self, threads: Array, *work: Array) -> None:
        self.running.append((threads, self.committed[threads], work))

    def commit(self, threads: Array) -> None:
        self.committed[threads] += 1

    def wait(self, threads: Array, latest: int) -> Iterator[tuple[Array, ...]]:
        """The work of these threads' groups but for so many of the latest, each piece with its thread."""
        until = np.zeros_like(self.committed)
        until[threads] = self.committed[threads] - latest
        running, self.running = self.running, []
        for owner, group, work in running:
            done = group < until[owner]
            if done.any():
                yield owner[done], *(x[done] for x in work)
            if not done.all():
                self.running.append((owner[~done], group[~done], tuple(x[~done] for x in work)))


class Machine:
    """Runs some programs of a launch."""

    def __init__(
        self, kernel: Kernel, grid: tuple[int, int, int], programs: range, shared: int, values: list[Any],
        tensors: list[Global],
    ):  # fmt: skip
        self.kernel, self.first_program, self.tensors = kernel, programs.start, tensors
        self.threads = np.arange(len(programs) * kernel.threads)
        self.running = np.ones(len(self.threads), bool)
        self.program, thread = np.divmod(self.threads, kernel.threads)
        self.warp = thread // LANES
        z, y, x = np.unravel_index(self.program + self.first_program, grid[::-1])
        numbers = {"%tid.x": thread, "%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": z}
        numbers |= {f"%nctaid.{axis}": np.array(size) for axis, size in zip("xyz", grid, strict=True)}
        self.registers: dict[str, Array] = {name: x.astype("u4") for name, x in numbers.items()}
        self.shared = Shared(len(programs), shared)
        self.copies, self.products = Groups(len(self.threads)), Groups(len(self.threads))
        scratch = [0] * (len(kernel.parameters) - len(values))  # Triton's, which no kernel here needs
        parameters = zip(kernel.parameters.items(), values + scratch, strict=True)
        self.parameters = {name: np.array(x).astype(kind) for (name, kind), x in parameters}

    def run(self) -> None:
        """Always the threads that are furthest behind, so that those that part meet again."""
        code, labels = self.kernel.code, self.kernel.labels
        joints = set(labels.values())
        # The next instruction of each thread, and a whole program ahead for each jump back.
        waiting = np.zeros(len(self.threads), int)
        while (behind := int(waiting.min())) != ENDED:
            together = waiting == behind
            at = behind % len(code)
            round_at = behind - at
            while True:
                instruction = code[at]
                self.running = together & self._allowed(instruction)
                at += 1
                waiting[together] = round_at + at
                if instruction.operation == "bra":
                    to = labels[instruction.operands[0]]
                    waiting[self.running] = round_at + to + (len(code) if to < at else 0)
                elif instruction.operation == "ret":
                    waiting[self.running] = ENDED
                else:
                    self._execute(instruction)
                    if at not in joints:
                        continue
                break

    def _allowed(self, instruction: Instruction) -> Array:
        if instruction.guard is None:
            return np.array(True)
        predicate, holds = instruction.guard
        return self.read(predicate, "?") == holds

    def _execute(self, instruction: Instruction) -> None:
        if instruction.operation not in OPERATIONS:
            raise NotImplementedError(instruction.text)
        try:
            OPERATIONS[instruction.operation](self, instruction, *instruction.operands)
        except Fault as fault:
            raise Fault(f"{fault}: {instruction.text}") from None

    def read(self, operand: Operand, kind: str) -> Array:
        """A value for each thread, or one for all."""
        if isinstance(operand, str):
            return self._register(operand).view(kind)
        if isinstance(operand, Float):
            return np.array(operand.bits, "u4").view(kind)
        if kind == "?":
            return np.array(operand != 0)
        size = np.dtype(kind).itemsize
        return np.array(operand % 256**size, f"u{size}").view(kind)

    def read_for(self, threads: Array, operand: Operand, kind: str) -> Array:
        return np.broadcast_to(self.read(operand, kind), self.threads.shape)[threads]

    def write(self, register: str, values: Array) -> None:
        """Gives every running thread its value, extended to the register's width."""
        old = self._register(register)
        narrow = values.itemsize < old.itemsize and values.size <= old.size  # else it is two in one
        values = values.astype(old.dtype) if narrow else values.view(old.dtype)
        self.registers[register] = np.where(self.running, values, old)

    def write_for(self, threads: Array, register: str, values: Array) -> None:
        new = np.empty(len(self.threads), values.dtype)
        new[threads] = values
        self.write(register, new)

    def _register(self, name: str) -> Array:
        if name not in self.registers:
            kind = np.dtype(self.kernel.registers[name.rstrip("0123456789")])
            self.registers[name] = np.full(len(self.threads) * kind.itemsize, 0xFF, "u1").view(kind)
        return self.registers[name]

    def together(self, size: int) -> Array:
        """The running threads, `[groups, size]`, in groups that must not part."""
        running = self.running.reshape(-1, size)
        if (running.any(1) != running.all(1)).any():
            raise Fault("threads that must be together have parted")
        return self.threads.reshape(-1, size)[running.all(1)]

    def find(self, space: str, address: Address, width: int, threads: Array) -> tuple[Memory, Array, Array]:
        """The memory of which these threads access so many bytes; where in it, and for which warp or program."""
        at = self.read_for(threads, address.base, "u8" if space == "global" else "u4").astype(int) + address.offset
        if (at % width).any():
            raise Fault(f"an access to {width} bytes is misaligned")
        if space == "shared":
            self.check_shared(at, width)
            return self.shared, at + self.program[threads] * self.shared.size, self.warp[threads]
        for tensor in self.tensors:
            if ((at >= tensor.start) & (at + width <= tensor.start + tensor.size)).all():
                return tensor, at - tensor.start, self.first_program + self.program[threads]
        raise Fault("an access outside the tensors")

    def check_shared(self, at: Array, width: int) -> None:
        if ((at < 0) | (at + width > self.shared.size)).any():
            raise Fault("an access outside the shared memory")


OPERATIONS: dict[str, Callable[..., None]] = {}


def operation(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(execute: Callable[..., None]) -> Callable[..., None]:
        OPERATIONS.update(dict.fromkeys(names, execute))
        return execute

    return register


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
    kind, form = instruction.type, instruction.parts[1]
    exact = f"{kind[0]}8"  # the product, and so a float's sum rounds once
    result = machine.read(a, kind).astype(exact) * machine.read(b, kind).astype(exact)
    if form == "hi":
        result >>= 32
    if form == "wide":
        kind = exact
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
        for owner, place, words in machine.copies.wait(threads, operands[0]):
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


@operation("bar")
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


# Matrix products. A warp holds a tile as the manual of PTX draws it: lanes in g(roups) of four t(hreads), e(lements) of
# a register, the upper or lower h(alf) of rows, the steps k of the summed axis.


@operation("mma")
def multiply_in_warps(machine: Machine, instruction: Instruction, d: list, a: list, b: list, c: list) -> None:
    warps, kind = machine.together(LANES), instruction.parts[-2]
    left = rearrange(_fragments(machine, a, kind, warps), "(k h) w (g t) e -> w (h g) (k t e)", h=2, t=4)
    right = rearrange(_fragments(machine, b, kind, warps), "k w (g t) e -> w (k t e) g", t=4)
    before = _fragments(machine, c, "f32", warps)[..., 0]
    product = rearrange(left @ right, "w (h g) (t e) -> (h e) w (g t)", h=2, t=4)
    _spread(machine, d, before + product, warps)


@operation("wgmma")
def multiply_in_warpgroups(machine: Machine, instruction: Instruction, *operands: Operand) -> None:
    groups, form = machine.together(4 * LANES), instruction.parts[1]
    if form == "commit_group":
        machine.products.commit(groups.ravel())
    elif form == "wait_group":
        for owner, place in machine.products.wait(groups.ravel(), operands[0]):
            machine.shared.load(place, "u2", machine.warp[owner])
    elif form == "mma_async":
        d, a, b, adds, _, _, *transposed = operands
        columns, depth = map(int, re.findall(r"m64n(\d+)k(\d+)", instruction.text)[0])
        kind = instruction.parts[-2]
        if isinstance(a, list):
            pattern = "(k h) w (warp g t) e -> w (warp h g) (k t e)"
            left = rearrange(_fragments(machine, a, kind, groups), pattern, h=2, warp=4, t=4)
        else:
            left = _shared_matrix(machine, a, 64, depth, transposed[0], kind, groups)
        right = _shared_matrix(machine, b, columns, depth, transposed[-1], kind, groups)
        pattern = "w (warp h g) (block t e) -> (block h e) w (warp g t)"
        product = rearrange(left @ right.swapaxes(1, 2), pattern, warp=4, h=2, t=4, e=2)
        before = _fragments(machine, d, "f32", groups)[..., 0]
        _spread(machine, d, np.where(machine.read_for(groups, adds, "?"), before, 0) + product, groups)


def _fragments(machine: Machine, registers: list[str], kind: str, threads: Array) -> Array:
    """`[register, group of threads, thread, element]` in float32."""
    words = np.stack([machine.read(x, "u4")[threads] for x in registers])[..., None]
    if kind in HALVES:
        return HALVES[kind].decode(words.view("u2"))
    return (words & TF32 if kind == "tf32" else words).view("f4")


def _spread(machine: Machine, registers: list[str], values: Array, threads: Array) -> None:
    for register, x in zip(registers, values, strict=True):
        machine.write_for(threads, register, np.ascontiguousarray(x))


def _shared_matrix(
    machine: Machine, descriptor: str, rows: int, depth: int, transposed: int, kind: str, groups: Array
) -> Array:
    """`[group, rows, depth]` of halves; a row, or transposed a column, lies in swizzled lines of shared memory."""
    bits = machine.read(descriptor, "u8")[groups[:, 0]].astype(int)[:, None, None]
    start, leading, stride = ((bits >> first & 0x3FFF) << 4 for first in (0, 16, 32))
    (swizzle,) = np.unique(bits >> 62 & 3)
    if not swizzle:
        raise NotImplementedError("matrices that are not swizzled")
    line = 256 >> swizzle
    row, column = np.arange(rows)[:, None], np.arange(depth)
    if transposed:
        at = 2 * row // line * leading + 2 * row % line + column // 8 * stride + column % 8 * line
    else:
        at = row // 8 * stride + row % 8 * line + 2 * column
    at = start + at
    at ^= (at >> 7 & line // 16 - 1) << 4
    machine.check_shared(at, 2)
    place = (at + machine.program[groups[:, 0]][:, None, None] * machine.shared.size) // 2
    if machine.shared.unfenced.view("u2")[place].any():
        raise Fault("matrix units read what was stored without a fence")
    for first in groups[:, ::LANES].T:
        owner = np.broadcast_to(first[:, None, None], place.shape)
        halves = machine.shared.load(place, "u2", machine.warp[owner])
        # It is read until the product has been waited for.
        machine.products.begin(owner.ravel(), place.ravel())
    return HALVES[kind].decode(halves)
