"""Matrix products: of a warp, of four warps, and of Blackwell's unit with a memory of its own.

A warp holds a tile as the manual of PTX draws it: lanes in g(roups) of four t(hreads), e(lements) of a register, the
upper or lower h(alf) of rows, the steps k of the summed axis.
"""

from __future__ import annotations

import re

import numpy as np
from einops import rearrange

from tests.oracles.ptx.language import Address, Instruction, Operand
from tests.oracles.ptx.machine import LANES, Machine, operation
from tests.oracles.ptx.memory import Array, Fault
from tests.oracles.ptx.operations import HALVES, TF32


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
        until = machine.products.committed[groups.ravel()] - operands[0]
        for owner, place in machine.products.wait(groups.ravel(), until):
            machine.shared.load(place, "u2", machine.warp[owner])
    elif form == "mma_async":
        d, a, b, adds, _, _, *transposed = operands
        columns, depth = map(int, re.findall(r"m64n(\d+)k(\d+)", instruction.text)[0])
        kind = instruction.parts[-2]
        if isinstance(a, list):
            pattern = "(k h) w (warp g t) e -> w (warp h g) (k t e)"
            left = rearrange(_fragments(machine, a, kind, groups), pattern, h=2, warp=4, t=4)
        else:
            left = _read(machine, _shared_matrix(machine, a, 64, depth, transposed[0], groups), kind, groups)
        right = _read(machine, _shared_matrix(machine, b, columns, depth, transposed[-1], groups), kind, groups)
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


def _shared_matrix(machine: Machine, descriptor: str, rows: int, depth: int, transposed: int, groups: Array) -> Array:
    """Where `[group, rows, depth]` halves lie: a row, or transposed a column, in swizzled lines of shared memory."""
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
    return place


def _read(machine: Machine, place: Array, kind: str, groups: Array) -> Array:
    """By all four warps, until they have waited for the product."""
    for first in groups[:, ::LANES].T:
        owner = np.broadcast_to(first[:, None, None], place.shape)
        halves = machine.shared.load(place, "u2", machine.warp[owner])
        machine.products.begin(owner.ravel(), place.ravel())
    return HALVES[kind].decode(halves)


@operation("elect")
def elect(machine: Machine, instruction: Instruction, to: list[str], _: int) -> None:
    machine.together(LANES)
    machine.write(to[0], np.zeros(1, "u4"))
    machine.write(to[1], machine.threads % LANES == 0)


@operation("mbarrier")
def wait_for_products(machine: Machine, instruction: Instruction, *operands: Operand) -> None:
    if instruction.parts[1] == "try_wait":
        complete, barrier, _ = operands
        programs, until = _waiting(machine, barrier)
        for _, *where in machine.tensor_products.wait(programs, until[programs]):
            uses = machine.shared.in_use if len(where) == 1 else machine.tensor_memory.in_use
            uses[tuple(where)] -= 1
        machine.write(complete, np.ones(1, bool))


@operation("tcgen05")
def use_tensor_memory(machine: Machine, instruction: Instruction, *operands: Operand) -> None:
    form = instruction.parts[1]
    if form == "alloc":
        allocate(machine, *operands)
    elif form in ("ld", "st"):
        move_tensors(machine, instruction, *operands)
    elif form == "mma":
        multiply_in_tensor_memory(machine, *operands)
    elif form == "commit":
        programs, until = _waiting(machine, *operands)
        machine.tensor_products.commit(programs)
        until[programs] = machine.tensor_products.committed[programs]


def _waiting(machine: Machine, address: Address) -> tuple[Array, Array]:
    """The running programs, and the groups that each program's barrier at this address waits for."""
    (barrier,) = np.unique(machine.address(machine.threads[machine.running], address))
    return np.unique(machine.program[machine.running]), machine.barriers[int(barrier)]


def allocate(machine: Machine, address: Address, columns: int) -> None:
    first = machine.together(LANES)[:, 0]
    memory, at, who = machine.find("shared", address, 4, first)
    programs = machine.program[first]
    memory.store(at // 4, "u4", who, machine.tensor_memory.allocated[programs].astype("u4"))
    machine.tensor_memory.allocated[programs] += columns


def move_tensors(machine: Machine, instruction: Instruction, *operands: Operand) -> None:
    """A warp's lanes: each has a row of columns, or 16 of them have two halves of it, or all of them a matrix tile."""
    loads = instruction.parts[1] == "ld"
    registers = operands[0] if loads else operands[-1]
    address = next(x for x in operands if isinstance(x, Address))
    warps, lane, number = machine.together(LANES), np.arange(LANES), np.arange(len(registers))[:, None]
    shape = instruction.parts[4]
    if shape == "32x32b":
        row, column = lane, number
    elif shape == "16x32bx2":
        half = next(x for x in operands if isinstance(x, int))
        row, column = lane % 16, number + lane // 16 * half
    elif shape == "16x256b":
        row, column = lane // 4 + number // 2 % 2 * 8, number // 4 * 8 + lane % 4 * 2 + number % 2
    else:
        raise NotImplementedError(instruction.text)
    base = machine.address(warps, address)[None]
    where = (machine.program[warps][None], (base >> 16) + row[..., None, :], (base & 0xFFFF) + column[:, None])
    if machine.tensor_memory.in_use[where].any():
        raise Fault("tensor memory is touched before a product has been waited for")
    if loads:
        for register, values in zip(registers, machine.tensor_memory.words[where], strict=True):
            machine.write_for(warps, register, values)
    else:
        machine.tensor_memory.words[where] = np.stack([machine.read_for(warps, x, "u4") for x in registers])


def multiply_in_tensor_memory(machine: Machine, d: Address, a: Operand, b: str, descriptor: str, adds: Operand) -> None:
    first = machine.threads[machine.running]
    programs = machine.program[first]
    groups = machine.threads.reshape(-1, machine.kernel.threads)[programs]
    if not (groups[:, 0] == first).all():
        raise NotImplementedError("products that another thread than the first has computed")
    (bits,) = np.unique(machine.read_for(first, descriptor, "u4").astype(int))
    rows, columns, depth = (bits >> 24 & 31) << 4, (bits >> 17 & 63) << 3, 16
    kind = {0: "f16", 1: "bf16"}[bits >> 7 & 7]
    # Of 64 rows, each warp has 16 of its 32 lanes.
    lane = np.arange(rows) if rows == 128 else np.arange(rows) // 16 * 32 + np.arange(rows) % 16
    words = machine.tensor_memory.words

    def place(address: Address, size: int) -> tuple[Array, ...]:
        base = machine.address(first, address)[:, None, None]
        where = programs[:, None, None], (base >> 16) + lane[:, None], (base & 0xFFFF) + np.arange(size)
        machine.tensor_memory.in_use[where] += 1
        machine.tensor_products.begin(programs, *np.broadcast_arrays(*where))
        return where

    def shared(descriptor: str, rows: int, transposed: int) -> Array:
        place = _shared_matrix(machine, descriptor, rows, depth, transposed, groups)
        machine.shared.in_use[2 * place] += 1
        machine.tensor_products.begin(programs, 2 * place)
        return HALVES[kind].decode(machine.shared.use(place, "u2", 0))

    if isinstance(a, Address):
        left = HALVES[kind].decode(words[place(a, depth // 2)].view("u2"))
    else:
        left = shared(a, rows, bits >> 15 & 1)
    right = shared(b, columns, bits >> 16 & 1)
    into = place(d, columns)
    before = np.where(machine.read_for(first, adds, "?")[:, None, None], words[into].view("f4"), 0)
    words[into] = (before + left @ right.swapaxes(1, 2)).view("u4")
