"""The `tiled` backend on a batch of maps of different sizes: each map by itself, exactly as it would be alone."""

from __future__ import annotations

import torch
from torch import Tensor

from dinat_triton import tiled
from dinat_triton.map_batch import MapBatch


def forward(
    qkv: list[Tensor],
    rpb: Tensor | None,
    seed: Tensor | None,
    batch: MapBatch,
    scale: float,
    dropout_p: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Attends on every map."""

    def of_one(own, geometry, own_seed):
        return tiled.forward(_as_alone(own), rpb, own_seed, geometry, scale, dropout_p, need_lse)

    return batch.each(of_one, qkv, seed)


def backward(
    qkv: list[Tensor],
    rpb: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    batch: MapBatch,
    scale: float,
    dropout_p: float,
    grads: list[Tensor | None],
    wants_bias: bool = True,
) -> Tensor | None:
    """Writes every map's gradients into its part of `grads`, and returns that of `rpb`: the sum over the maps."""
    count, wanted = len(qkv), [grad for grad in grads if grad is not None]
    end = count + len(wanted)
    given = [*qkv, *wanted, grad_out] if grad_lse is None else [*qkv, *wanted, grad_out, grad_lse]
    grads_rpb: list[Tensor] = []
    for geometry, own, own_seed in batch.problems(given, seed):
        own_qkv, own_wanted = _as_alone(own[:count]), iter(own[count:end])
        own_out, *rest = _as_alone(own[end:])
        own_grads = [None if grad is None else next(own_wanted) for grad in grads]
        own_lse = rest[0] if rest else None
        grad_rpb = tiled.backward(
            own_qkv, rpb, own_seed, out, lse, own_out, own_lse, geometry, scale, dropout_p, own_grads, wants_bias
        )
        grads_rpb += () if grad_rpb is None else (grad_rpb,)
    return torch.stack(grads_rpb).sum(0) if grads_rpb else None


def _as_alone(maps: list[Tensor]) -> list[Tensor]:
    """Maps as they would lie in memory alone: matrix products round differently where rows lie differently."""
    return [x.clone(memory_format=torch.contiguous_format) for x in maps]
