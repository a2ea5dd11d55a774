"""Programs of several processes, started as torchrun would."""

import os
import socket
from collections.abc import Callable

import torch
from accelerate.state import AcceleratorState
from torch.multiprocessing.spawn import start_processes


def in_processes(ranks: int, program: Callable[..., None], *arguments: object) -> None:
    """Runs `program(*arguments)` in each. Forked: new ones would take longer to import torch and timm than for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    start_processes(_join, (ranks, port, program, *arguments), nprocs=ranks, start_method="fork")


def _join(rank: int, ranks: int, port: str, program: Callable[..., None], *arguments: object) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not live on in a forked process
    AcceleratorState._reset_state(reset_partial_state=True)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "OMP_NUM_THREADS": 1}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **{name: str(n) for name, n in numbers.items()}}
    program(*arguments)
