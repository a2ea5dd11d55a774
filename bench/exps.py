"""A Triton kernel that does nothing but exponentials: how many of them a GPU computes per second."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinat_triton.kernels.schedule import FUSION

BLOCK, ROUNDS, WARPS = 1024, 1024, 4
PROGRAMS_PER_MULTIPROCESSOR = 64


@triton.jit
def exps_kernel(x, out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums 2^(x - round) over the rounds: no round waits for another one's exponential. Grid (blocks).

    An exponential goes with two additions, which have eight times its rate.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(ROUNDS):
        total += tl.exp2(value)
        value -= 1.0
    tl.store(out + at, total)


def launch(x: Tensor, out: Tensor, rounds: int = ROUNDS) -> int:
    """Runs the kernel on float32 tensors that hold a multiple of BLOCK numbers; returns how many it exponentiated."""
    exps_kernel[(x.numel() // BLOCK,)](x, out, ROUNDS=rounds, BLOCK=BLOCK, num_warps=WARPS, **FUSION)
    return x.numel() * rounds


def tensors(device: torch.device) -> tuple[Tensor, Tensor]:
    """Arguments and results, enough of them to fill the device several times over."""
    programs = PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    x = torch.linspace(0, 1, programs * BLOCK, device=device)
    return x, torch.empty_like(x)
