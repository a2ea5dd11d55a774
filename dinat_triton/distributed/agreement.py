"""Errors that every rank raises, where one rank alone would leave the others waiting for it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dinat_triton.distributed.shares import chunks

# What has to be alike on every rank: the name of each argument, and its value or its form.
Description = tuple[tuple[str, Any], ...]


def agree(mesh: DeviceMesh, description: Description, problem: Exception | None) -> None:
    """Raises on every rank if one has a problem, or describes a call otherwise than the others.

    Args:
        mesh: The ranks.
        description: What is to be alike.
        problem: What is wrong on this rank.
    """
    found = problem
    for dim in range(mesh.ndim):
        reports: list[Any] = [None] * mesh.size(dim)
        dist.all_gather_object(reports, (description, found), group=mesh.get_group(dim))
        found = found or _first_problem(reports)
    if found is not None:
        raise found


@lru_cache(maxsize=4096)
def agree_once(mesh: DeviceMesh, description: Description, local: tuple[Any, ...], problem: Exception | None) -> None:
    """The same, but for calls that this rank has described before: asking takes longer than a small layer.

    A rank that need not ask waits for others that do, until the time-out of the process group.

    Args:
        mesh, description, problem: As `agree` has them.
        local: What may differ between ranks, but decides whether this one has a problem.
    """
    agree(mesh, description, problem)


def _first_problem(reports: list[tuple[Description, Exception | None]]) -> Exception | None:
    for rank, (_, problem) in enumerate(reports):
        if problem is not None:
            return type(problem)(f"{problem} (on rank {rank})")
    first = dict(reports[0][0])
    for rank, (description, _) in enumerate(reports):
        for name, value in description:
            if value != first.get(name):
                return ValueError(f"{name} must be alike on all ranks: {first.get(name)} on rank 0, {value} on {rank}")
    return None


def form_of(x: Any) -> str:
    """Facts of a tensor that have to be alike on every rank."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    placements = f" {x.placements} on a mesh of {tuple(x.device_mesh.shape)}" if isinstance(x, DTensor) else ""
    return f"{tuple(x.shape)} {x.dtype}{placements}"


@torch.no_grad()
def local_shape(x: DTensor) -> tuple[int, ...]:
    return tuple(x.to_local().shape)


def check_local_part(name: str, x: DTensor) -> None:
    """Refuses a local part that is not what DTensor gives this rank of the whole; `from_local` takes any."""
    mesh, expected = x.device_mesh, list(x.shape)
    for dim, placement in enumerate(x.placements):
        if type(placement) is Shard:
            pieces = chunks(expected[placement.dim], mesh.size(dim))
            expected[placement.dim] = len(pieces[mesh.get_local_rank(dim)])
    if local_shape(x) != tuple(expected):
        raise ValueError(
            f"{name} must have a local part of shape {tuple(expected)}, as torch.chunk cuts {tuple(x.shape)}, "
            f"got {local_shape(x)}"
        )
