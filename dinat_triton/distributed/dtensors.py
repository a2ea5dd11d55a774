"""`na1d`, `na2d` and `na3d` on DTensors: which placements they take, and what each rank then computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from dinat_triton.checks import check_dropout, check_key_mask, check_rank, check_rpb, check_scale, check_tensors
from dinat_triton.distributed.agreement import agree_once, check_local_part, form_of, local_shape
from dinat_triton.distributed.attention import Split, attend_shards
from dinat_triton.distributed.gradients import shared
from dinat_triton.functional import window_of
from dinat_triton.geometry import geometry_of

Placements = tuple[Placement, ...]


@torch.compiler.disable
def na(
    rank: int, query: Any, key: Any, value: Any, key_mask: Any, *window: Any, rpb: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attends on DTensors that are sharded alike, over batch, map axes or heads. So are the outputs.

    rank: Axes of the map.
    query, key, value, key_mask, rpb: As the public functions have them.
    window: kernel_size, stride, dilation, is_causal and border.
    options: The other arguments of the public functions.
    """
    given = {"query": query, "key": key, "value": value, "key_mask": key_mask, "rpb": rpb}
    tensors = {name: x for name, x in given.items() if x is not None}
    mesh = next(x.device_mesh for x in tensors.values() if isinstance(x, DTensor))
    names = ("kernel_size", "stride", "dilation", "is_causal", "border")
    alike = [*((name, form_of(x)) for name, x in tensors.items()), *zip(names, map(str, window), strict=True)]
    local = tuple(local_shape(x) for x in tensors.values() if isinstance(x, DTensor))
    agree_once(mesh, (*alike, *options.items()), local, _problem(rank, tensors, mesh, window, options))
    shape, flat = tuple(query.shape[1 : 1 + rank]), window_of(rank, *window)
    local_rpb = None if rpb is None else _local_bias(rpb, query, rank)
    q, k, v, local_mask = (x if x is None else x.to_local() for x in (query, key, value, key_mask))
    out, lse = attend_shards(q, k, v, shape, flat, _splits(query, rank), local_rpb, key_mask=local_mask, **options)
    outs = _distributed(out, query, (*query.shape[:-1], value.shape[-1]))
    return outs, None if lse is None else _distributed(lse, query, tuple(query.shape[:-1]))


def _problem(
    rank: int, tensors: dict[str, Any], mesh: DeviceMesh, window: tuple[Any, ...], options: dict[str, Any]
) -> Exception | None:
    """Error in a call, kept so that all ranks can raise it."""
    try:
        query, key, value = (tensors[name] for name in ("query", "key", "value"))
        for name in ("query", "key", "value"):
            check_rank(name, tensors[name], rank)
            _check_dtensor(name, tensors[name], mesh, getattr(query, "placements", None))
        check_tensors(query, key, value)
        if "key_mask" in tensors:
            check_key_mask(tensors["key_mask"], query.shape[:-2], query.device)
            _check_dtensor("key_mask", tensors["key_mask"], mesh, _without_heads(query, rank))
        check_scale(options["scale"])
        check_dropout(options["dropout_p"])
        flat = window_of(rank, *window)
        geometry = geometry_of(tuple(query.shape[1 : 1 + rank]), tuple(flat))
        _check_placements(query, key, rank)
        if "rpb" in tensors:
            check_rpb(tensors["rpb"], query, geometry)
            _check_bias(tensors["rpb"], query, mesh, rank)
    except (ValueError, TypeError) as error:
        return error
    return None


def _check_dtensor(name: str, x: Tensor, mesh: DeviceMesh, placements: Placements | None) -> None:
    if not isinstance(x, DTensor):
        raise TypeError(f"{name} must be a DTensor, as other arguments are, got a {type(x).__name__}")
    if x.device_mesh != mesh:
        raise ValueError(f"{name} must be on the mesh of the other DTensors, {mesh}, got {x.device_mesh}")
    if placements is not None and x.placements != placements:
        raise ValueError(f"{name} must be placed with query, by {placements}, got {x.placements}")
    check_local_part(name, x)


def _without_heads(query: DTensor, rank: int) -> Placements:
    """The placements of what has no heads, and is cut with the query."""
    return tuple(Replicate() if placement == Shard(rank + 1) else placement for placement in query.placements)


def _check_placements(query: DTensor, key: Tensor, rank: int) -> None:
    shards: list[int] = []
    for dim, placement in enumerate(query.placements):
        if type(placement) is not Replicate and type(placement) is not Shard:
            raise ValueError(f"query must be placed by Shard or Replicate, got {placement}")
        if type(placement) is Shard:
            ranks, at = query.device_mesh.size(dim), placement.dim % query.ndim
            if at == query.ndim - 1:
                raise ValueError(f"query must not be sharded over the channels of its heads, got {placement}")
            if at == rank + 1 and key.shape[at] % ranks != 0:
                raise ValueError(f"key must have a multiple of {ranks} heads to be sharded, got {key.shape[at]}")
            if at > 0 and at in shards:
                raise ValueError(f"query must not be sharded twice over axis {at}: flatten these mesh dimensions")
            shards.append(at)


def _check_bias(rpb: Tensor, query: DTensor, mesh: DeviceMesh, rank: int) -> None:
    if not isinstance(rpb, DTensor):
        return
    if rpb.device_mesh != mesh:
        raise ValueError(f"rpb must be on the mesh of query, {mesh}, got {rpb.device_mesh}")
    for placement, of_query in zip(rpb.placements, query.placements, strict=True):
        with_heads = placement == Shard(0) and of_query == Shard(rank + 1)
        if type(placement) is not Replicate and not with_heads:
            raise ValueError(
                f"rpb must be replicated, or sharded over its heads where query is over its own, got {rpb.placements} "
                f"with query's {query.placements}"
            )


def _splits(query: DTensor, rank: int) -> tuple[Split | None, ...]:
    """The split of each map axis, if it has one."""
    mesh = query.device_mesh
    splits: list[Split | None] = [None] * rank
    for dim, placement in enumerate(query.placements):
        if isinstance(placement, Shard) and 1 <= placement.dim <= rank:
            splits[placement.dim - 1] = Split(mesh.get_group(dim), mesh.size(dim), mesh.get_local_rank(dim))
    return tuple(splits)


def _local_bias(rpb: Tensor, query: DTensor, rank: int) -> Tensor:
    """The bias of the local heads. Its gradient is summed over the ranks whose queries it serves."""
    mesh = query.device_mesh
    own = rpb.placements if isinstance(rpb, DTensor) else (Replicate(),) * mesh.ndim
    local = rpb.to_local() if isinstance(rpb, DTensor) else rpb
    serves = [dim for dim, p in enumerate(query.placements) if isinstance(p, Shard) and isinstance(own[dim], Replicate)]
    groups: list[dist.ProcessGroup] = [mesh.get_group(dim) for dim in serves]
    local = shared(local, groups)
    for dim in serves:
        if query.placements[dim] == Shard(rank + 1):
            heads = len(local) // mesh.size(dim)
            local = local.narrow(0, heads * mesh.get_local_rank(dim), heads)
    return local


def _distributed(x: Tensor, like: DTensor, shape: tuple[int, ...]) -> DTensor:
    """A local part as a DTensor that is sharded like another."""
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(x, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
