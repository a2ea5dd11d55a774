"""Runs the PTX of compiled kernels on the CPU, in numpy.

It knows the instructions these kernels are made of and nothing more, and it is stricter than a GPU. What faults: an
access outside the tensors of the launch, a misaligned one, two programs that write one place, a barrier that a part of
a program does not reach, warps that meet in shared memory with no barrier in between, matrix units that read what
threads stored there without a fence, tensor memory that is touched while a product uses it. Copies have not arrived
before they are waited for, and what nobody wrote reads as NaN. What it does not see: the results of wgmma are there at
once, and a wait on an mbarrier is taken for the right phase.
"""

from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from tests.oracles.ptx import matrices, operations  # noqa: F401  (what the machine can do)
from tests.oracles.ptx.language import Kernel, parse
from tests.oracles.ptx.machine import Machine
from tests.oracles.ptx.memory import Fault, Global

__all__ = ["PROGRAMS_IN_STEP", "Fault", "Kernel", "launch", "parse"]

# Enough to make numpy's own time per instruction small.
PROGRAMS_IN_STEP = 64


def launch(kernel: Kernel, grid: tuple[int, int, int], shared: int, arguments: list[Any]) -> None:
    """Runs a kernel on the CPU's tensors, with so many bytes of shared memory per program."""
    tensors = [Global(x) for x in arguments if isinstance(x, Tensor)]
    values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    programs = prod(grid)
    for first in range(0, programs, PROGRAMS_IN_STEP):
        some = range(first, min(first + PROGRAMS_IN_STEP, programs))
        with np.errstate(all="ignore"):
            Machine(kernel, grid, some, shared, values, tensors).run()
