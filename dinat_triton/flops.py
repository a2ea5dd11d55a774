"""Floating-point operations of the ops, counted by `torch.utils.flop_counter.FlopCounterMode`.

Counted is what the definition asks for, as torch counts its own attention: two products over the pairs that attend, and
five in the backward, which computes the scores anew. With `FlopCounterMode(custom_mapping=EVALUATED)` it is what the
plan of the call evaluates: whole tiles, padding and masked pairs included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dinat_triton import fused, tiled  # noqa: F401  (fused defines what is counted)
from dinat_triton.geometry import Geometry, geometry_of
from dinat_triton.map_batch import map_batch_of
from dinat_triton.passes import BIAS, TRAFFIC, Pass
from dinat_triton.plan import Plan


@dataclass(frozen=True)
class Dims:
    """Sizes that the work of a call depends on."""

    geometry: Geometry
    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int

    def flops(self, scores: int, form: str) -> int:
        """Operations of a form of a pass, for so many scores of one map."""
        over_dim, over_value_dim = TRAFFIC[form].products
        return 2 * self.batch * self.heads * scores * (over_dim * self.dim + over_value_dim * self.value_dim)


def dims_of(shapes: list[torch.Size], window: list[int], sizes: list[int] | None) -> list[Dims]:
    """Those of query, key and value, or of the tensor that packs them: one for all maps, or one for each."""
    query, key, value = shapes[:3] if len(shapes) >= 3 else 3 * [shapes[0][:-3] + shapes[0][-2:]]
    channels = (query[-2], key[-2], query[-1], value[-1])
    if sizes is None:
        return [Dims(geometry_of(tuple(query[1:-2]), tuple(window)), query[0], *channels)]
    batch = map_batch_of(tuple(query[:-2]), tuple(window), tuple(sizes))
    return [Dims(geometry, 1, *channels) for geometry in batch.geometries]


@register_flop_formula(torch.ops.dinat_triton.fused)
def useful(qkv, rpb, seed, window, scale, dropout_p, need_lse, backend, sizes=None, **others) -> int:
    """The forward, as it is defined."""
    return sum(dims.flops(dims.geometry.num_pairs, Pass.FORWARD) for dims in dims_of(qkv, window, sizes))


@register_flop_formula(torch.ops.dinat_triton.fused_backward)
def useful_backward(
    qkv, rpb, seed, out, lse, grad_out, grad_lse, window, scale, dropout_p, backend, sizes=None, wanted=None, **others
) -> int:
    """The backward, as it is defined, whichever gradients are wanted."""
    return sum(dims.flops(dims.geometry.num_pairs, Pass.CLOSED_BACKWARD) for dims in dims_of(qkv, window, sizes))


def evaluated(qkv, rpb, seed, window, scale, dropout_p, need_lse, backend, sizes=None, **others) -> int:
    """The forward, as its plan evaluates it."""
    every = dims_of([x.shape for x in qkv], window, sizes)
    return sum(_evaluated(dims, qkv[0], rpb is not None, backend, is_backward=False) for dims in every)


def evaluated_backward(
    qkv, rpb, seed, out, lse, grad_out, grad_lse, window, scale, dropout_p, backend, sizes=None, wanted=None, **others
) -> int:
    """The backward, as its plans evaluate it."""
    every = dims_of([x.shape for x in qkv], window, sizes)
    return sum(_evaluated(dims, qkv[0], rpb is not None, backend, is_backward=True) for dims in every)


def _evaluated(dims: Dims, query: Tensor, has_bias: bool, backend: str, is_backward: bool) -> int:
    if backend == "tiled":
        tile = tiled.choose_tile(dims.geometry, dims.batch, dims.heads, query.dtype, query.device.type)
        scores = Plan(dims.geometry, tile).cost().scores
        return dims.flops(scores, Pass.CLOSED_BACKWARD if is_backward else Pass.FORWARD)
    launches = _launches(dims, query, has_bias, is_backward)
    return sum(dims.flops(plan.cost().scores, form) for plan, form in launches)


def _launches(dims: Dims, query: Tensor, has_bias: bool, is_backward: bool) -> Iterator[tuple[Plan, str]]:
    """The plan of every launch of the Triton kernels, and the form of its pass."""
    from dinat_triton.kernels.schedule import has_closed_backward, plan_of, problem_of

    counts = (dims.batch, dims.heads, dims.kv_heads, dims.dim, dims.value_dim)
    tf32 = query.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    problem = problem_of(dims.geometry, *counts, query.dtype, query.device, has_bias, tf32)
    passes: tuple[Pass, ...] = (Pass.FORWARD,)
    if is_backward:
        general = (Pass.QUERY_BACKWARD, Pass.KEY_BACKWARD)
        passes = (Pass.CLOSED_BACKWARD,) if has_closed_backward(problem) else general
    for pass_ in passes:
        plan = plan_of(problem, pass_)
        assert isinstance(plan, Plan)  # of one geometry
        yield plan, pass_
        if pass_ == Pass.QUERY_BACKWARD and has_bias and plan.largest[1] > plan.chunk:
            yield plan, BIAS


EVALUATED = {torch.ops.dinat_triton.fused: evaluated, torch.ops.dinat_triton.fused_backward: evaluated_backward}
for formula in EVALUATED.values():
    formula._get_raw = True  # type: ignore[attr-defined]  # they read tensors, not their shapes: configs go by dtype
