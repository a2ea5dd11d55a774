"""Errors that every rank raises, where one rank alone would leave the others waiting for it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# What has to be alike on every rank: the name of each argument, and its value or its form.
Description = tuple[tuple[str, Any], ...]


@lru_cache(maxsize=4096)
def agree(mesh: DeviceMesh, description: Description, local: tuple[Any, ...], problem: Exception | None) -> None:
    """Raises on every rank if one has a problem, or describes a call otherwise than the others.

    The ranks tell each other once for every new description. One that has told its own before waits no more, so a
    difference that arises later shows as a time-out of the process group.

    Args:
        mesh: The ranks.
        description: What is to be alike.
        local: What may differ between ranks but decides whether this one has a problem.
        problem: What is wrong on this rank.
    """
    found = problem
    for dim in range(mesh.ndim):
        reports: list[Any] = [None] * mesh.size(dim)
        dist.all_gather_object(reports, (description, found), group=mesh.get_group(dim))
        found = found or _first_problem(reports)
    if found is not None:
        raise found


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
