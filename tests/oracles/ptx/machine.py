"""The machine: a launch's threads in step, a register an array with a value for each of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.oracles.ptx.language import Address, Instruction, Kernel, Operand
from tests.oracles.ptx.memory import UNWRITTEN, Array, Fault, Global, Groups, Memory, Shared, TensorMemory

LANES = 32
ENDED = np.iinfo(int).max
OPERATIONS: dict[str, Callable[..., None]] = {}


def operation(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(execute: Callable[..., None]) -> Callable[..., None]:
        OPERATIONS.update(dict.fromkeys(names, execute))
        return execute

    return register


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
        self.tensor_memory, self.tensor_products = TensorMemory(len(programs)), Groups(len(programs))
        # How many groups of a program's products an mbarrier waits for.
        self.barriers: defaultdict[int, Array] = defaultdict(lambda: np.zeros(len(programs), int))
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
                self.running = together
                if instruction.guard is not None:
                    predicate, holds = instruction.guard
                    self.running = together & (self.read(predicate, "?") == holds)
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
            self.registers[name] = np.full(len(self.threads) * kind.itemsize, UNWRITTEN, "u1").view(kind)
        return self.registers[name]

    def together(self, size: int) -> Array:
        """The running threads, `[groups, size]`, in groups that must not part."""
        running = self.running.reshape(-1, size)
        if (running.any(1) != running.all(1)).any():
            raise Fault("threads that must be together have parted")
        return self.threads.reshape(-1, size)[running.all(1)]

    def find(self, space: str, address: Address, width: int, threads: Array) -> tuple[Memory, Array, Array]:
        """The memory of which these threads access so many bytes; where in it, and for which warp or program."""
        at = self.address(threads, address)
        if (at % width).any():
            raise Fault(f"an access to {width} bytes is misaligned")
        if space == "shared":
            self.check_shared(at, width)
            return self.shared, at + self.program[threads] * self.shared.size, self.warp[threads]
        for tensor in self.tensors:
            if ((at >= tensor.start) & (at + width <= tensor.start + tensor.size)).all():
                return tensor, at - tensor.start, self.first_program + self.program[threads]
        raise Fault("an access outside the tensors")

    def address(self, threads: Array, address: Address) -> Array:
        """As wide as the register that holds it."""
        base = address.base
        held = self._register(base) if isinstance(base, str) else np.array(base)
        return np.broadcast_to(held, self.threads.shape)[threads].astype(int) + address.offset

    def check_shared(self, at: Array, width: int) -> None:
        if ((at < 0) | (at + width > self.shared.size)).any():
            raise Fault("an access outside the shared memory")
