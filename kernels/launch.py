"""The `triton` backend: what to launch for a problem, and the launches."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from dinat_triton.dropout import threshold
from dinat_triton.geometry import Geometry
from dinat_triton.kernels.backward import (
    closed_backward_kernel,
    fold_bias_kernel,
    key_backward_kernel,
    query_backward_kernel,
    sum_programs_kernel,
)
from dinat_triton.kernels.forward import forward_kernel
from dinat_triton.kernels.layout import Layout, layout_of
from dinat_triton.kernels.tiles import table_kernel
from dinat_triton.kernels.tuning import Architecture, architecture_of, choose_config, choose_plan, padded
from dinat_triton.packing import unpack

# Multiply and add in one instruction; what Triton does by default differs from version to version.
FUSION = {"enable_fp_fusion": True}
MOST_NARROW = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Problem:
    """All that launches depend on but the tensors themselves. Compared by identity: `problem_of` makes each once."""

    geometry: Geometry
    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    precision: str  # of float32 products
    wide: bool = False  # token addresses within a batch item need 64 bits

    @property
    def bits(self) -> int:
        return torch.finfo(self.dtype).bits


@dataclass(frozen=True)
class Schedule:
    """One kernel's launch: its plan on the device, its grid, and its compile-time options."""

    layout: Layout
    batch_step: int
    grid: tuple[int, ...]
    options: dict[str, Any]

    @property
    def one_chunk(self) -> bool:
        return self.layout.max_chunks == 1


@lru_cache(maxsize=512)
def schedule(problem: Problem, name: str) -> Schedule:
    """Shares a problem's work out among programs: over the batch first, then over tiles of one class."""
    architecture = architecture_of(problem.device)
    config = choose_config(
        name, max(padded(problem.dim), padded(problem.value_dim)), problem.bits, architecture.name, architecture.device,
        problem.geometry, problem.batch * problem.heads,
    )  # fmt: skip
    plan = choose_plan(problem.geometry, config, problem.dim * problem.bits // 8, name == "key_backward")
    heads = problem.kv_heads if name == "key_backward" else problem.heads
    work = sum(len(c.row_tokens) for c in plan.classes) * heads * problem.batch
    items = max(1, work // (config.programs * architecture.multiprocessors))  # tiles of one batch item, per program
    batch_step = min(items, problem.batch)
    # Powers of two, so that batches of any size share few layouts.
    tiles_per_run = 1 << max(0, (items // problem.batch).bit_length() - 1)
    layout = layout_of(plan, tiles_per_run, problem.wide, problem.device)
    options = {
        "D": problem.dim,
        "DV": problem.value_dim,
        "BLOCK_D": padded(problem.dim),
        "BLOCK_DV": padded(problem.value_dim),
        "ROWS": layout.rows,
        "CHUNK": plan.chunk,
        "PRECISION": problem.precision,
        "num_warps": min(config.warps, _room(architecture, layout.rows, plan.chunk)),
        "num_stages": config.stages,
    } | FUSION
    if architecture.is_amd:
        options["matrix_instr_nonkdim"] = 16
    grid = (len(layout.runs) * heads, triton.cdiv(problem.batch, batch_step))
    return Schedule(layout, batch_step, grid, options)


def _room(architecture: Architecture, rows: int, chunk: int) -> int:
    """Warps among which Triton can share a chunk out. It lays them all along one side; more would repeat work."""
    along_rows = architecture.is_amd or rows >= chunk
    return rows // 16 if along_rows else chunk // 8


@lru_cache(maxsize=512)
def has_closed_backward(problem: Problem) -> bool:
    """Whether one pass does the whole backward: no two tiles share a key, and no two heads do."""
    plan = schedule(problem, "closed_backward").layout
    return problem.heads == problem.kv_heads and plan.max_chunks == 1 and plan.plan.is_closed


def forward(
    qkv: list[Tensor],
    rpb: Tensor | None,
    seed: Tensor | None,
    geometry: Geometry,
    scale: float,
    dropout_p: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Attends; query, key and value are `[batch, *shape, heads, dim]`. The backward always needs the log-sum-exp."""
    query, key, value = unpack(qkv)
    q, k, v = _tokens(query), _tokens(key), _tokens(value)
    problem = _problem(geometry, q, k, v)
    plan = schedule(problem, "forward")
    rows = query.shape[:-1]
    out = query.new_empty((*rows, problem.value_dim))
    lse = query.new_empty(rows, dtype=torch.float32)
    rpb = None if rpb is None else rpb.contiguous()
    with _on(q.device):
        if plan.one_chunk:
            bias, bias_head = rpb, geometry.num_offsets
        else:
            bias, bias_head = _table(rpb, plan.layout, problem, scale)
        forward_kernel[plan.grid](
            q, k, v, out, lse, bias, seed, *_indices(plan.layout), plan.layout.rel,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *_sizes(problem, plan), bias_head, plan.layout.max_chunks, scale, *_keep(dropout_p),
            ONE_CHUNK=plan.one_chunk, HAS_BIAS=rpb is not None, DROPOUT=seed is not None, **plan.options,
        )  # fmt: skip
    return out, lse


def backward(
    qkv: list[Tensor],
    rpb: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    geometry: Geometry,
    scale: float,
    dropout_p: float,
    grads: list[Tensor],
) -> Tensor | None:
    """Writes the gradients of query, key and value into `grads`, and returns that of `rpb`."""
    q, k, v, grad_out = (_tokens(x) for x in (*unpack(qkv), grad_out))
    grad_q, grad_k, grad_v = (x.flatten(1, -3) for x in unpack(grads))
    problem = _problem(geometry, q, k, v, grad_q, grad_k, grad_v, grad_out)
    rpb = None if rpb is None else rpb.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    shared = {"HAS_GRAD_LSE": grad_lse is not None, "DROPOUT": seed is not None}
    keep = _keep(dropout_p)
    with _on(q.device):
        if has_closed_backward(problem):
            plan = schedule(problem, "closed_backward")
            partials = _partials(rpb, plan)
            closed_backward_kernel[plan.grid](
                q, k, v, lse, grad_out, grad_lse, grad_q, grad_k, grad_v, partials, rpb, seed,
                *_indices(plan.layout), plan.layout.rel,
                *_strides(q, k, v, grad_q, grad_k, grad_v, grad_out),
                *_sizes(problem, plan), geometry.num_offsets, scale, *keep,
                HAS_BIAS=rpb is not None, **shared, **plan.options,
            )  # fmt: skip
            return _fold(rpb, partials, plan)

        plan = schedule(problem, "query_backward")
        stats = lse.new_empty((*lse.shape, 2))  # of each row: the log-sum-exp to base 2, and delta
        partials = _partials(rpb, plan)
        for grad_query, grad_bias in _query_launches(rpb, plan):
            all_chunks = grad_query and not plan.one_chunk
            bias, bias_head = _table(rpb, plan.layout, problem, scale) if all_chunks else (rpb, geometry.num_offsets)
            query_backward_kernel[(*plan.grid, 1 if grad_query else plan.layout.max_chunks)](
                q, k, v, out, lse, grad_out, grad_lse, stats, grad_q, partials, bias, seed,
                *_indices(plan.layout), plan.layout.rel,
                *_strides(q, k, v, grad_q, grad_out),
                *_sizes(problem, plan), bias_head, plan.layout.max_chunks, scale, *keep,
                ALL_CHUNKS=all_chunks, GRAD_QUERY=grad_query, GRAD_BIAS=grad_bias, HAS_BIAS=rpb is not None,
                **shared, **plan.options,
            )  # fmt: skip
        grad_rpb = _fold(rpb, partials, plan)

        plan = schedule(problem, "key_backward")
        table, bias_head = _table(rpb, plan.layout, problem, scale)
        key_backward_kernel[plan.grid](
            q, k, v, grad_out, stats, grad_k, grad_v, table, seed, *_indices(plan.layout),
            *_strides(q, k, v, grad_k, grad_v, grad_out),
            *_sizes(problem, plan), bias_head, plan.layout.max_chunks, scale, *keep,
            DROPOUT=seed is not None, **plan.options,
        )  # fmt: skip
    return grad_rpb


def _query_launches(rpb: Tensor | None, plan: Schedule) -> list[tuple[bool, bool]]:
    """Whether each launch of `query_backward_kernel` computes dq, and the bias gradient."""
    if rpb is None or plan.one_chunk:
        return [(True, rpb is not None)]
    return [(True, False), (False, True)]


def _partials(rpb: Tensor | None, plan: Schedule) -> Tensor | None:
    """Room for the bias gradient of every program and pair."""
    if rpb is None:
        return None
    return torch.empty(plan.grid[1], plan.grid[0], plan.layout.pairs, dtype=torch.float32, device=rpb.device)


def _fold(rpb: Tensor | None, partials: Tensor | None, plan: Schedule) -> Tensor | None:
    """The bias gradient from that of every program and pair."""
    if rpb is None or partials is None:
        return None
    layout, heads = plan.layout, len(rpb)
    splits, programs, pairs = partials.shape
    classes = len(layout.rel)
    sums = torch.empty(heads, classes, pairs, dtype=torch.float32, device=rpb.device)
    sum_programs_kernel[(triton.cdiv(pairs, 256), classes, heads)](
        partials, sums, layout.first_run, programs, splits, heads, pairs, BLOCK=256, STEP=16, **FUSION
    )
    grad = torch.empty_like(rpb)
    offsets, longest = layout.members.shape
    fold_bias_kernel[(offsets, heads)](
        sums, layout.members, grad, classes * pairs, offsets, longest, BLOCK=min(1024, padded(longest)), **FUSION
    )
    return grad


def _table(rpb: Tensor | None, layout: Layout, problem: Problem, scale: float) -> tuple[Tensor, int]:
    """The bias of every pair of the layout over the scale, and its stride from head to head."""
    heads = 1 if rpb is None else problem.heads
    pairs = layout.rel.numel()
    table = torch.empty(heads, pairs, dtype=torch.float32, device=layout.rel.device)
    table_kernel[(triton.cdiv(pairs, 1024), heads)](
        rpb, layout.rel, table, 1 / scale, problem.geometry.num_offsets, pairs, HAS_BIAS=rpb is not None, BLOCK=1024,
        **FUSION,
    )  # fmt: skip
    return table, 0 if rpb is None else pairs


@lru_cache(maxsize=512)
def problem_of(
    geometry: Geometry,
    batch: int,
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    tf32: bool,
    token_stride: int,
) -> Problem:
    """The problem of tensors whose tokens lie at most `token_stride` elements apart."""
    # AMD has no tf32x3.
    precision = "tf32x3" if tf32 and torch.version.hip is None else "ieee"
    if device.type == "cpu":
        precision = "interpreted"
    wide = geometry.num_tokens * token_stride > MOST_NARROW
    return Problem(geometry, batch, heads, kv_heads, dim, value_dim, dtype, device, precision, wide)


def _problem(geometry: Geometry, q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> Problem:
    batch, _, heads, dim = q.shape
    _, _, kv_heads, value_dim = v.shape
    strides = [x.stride(1) for x in (q, k, v, *others)]
    return problem_of(
        geometry, batch, heads, kv_heads, dim, value_dim, q.dtype, q.device, torch.backends.cuda.matmul.allow_tf32,
        max(*strides, heads * value_dim),
    )  # fmt: skip


def _tokens(x: Tensor) -> Tensor:
    """`[batch, tokens, heads, dim]`, a view wherever the map's strides allow it."""
    return _last_contiguous(x).flatten(1, -3)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _indices(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    return layout.row_tokens, layout.col_tokens, layout.runs


def _sizes(problem: Problem, plan: Schedule) -> tuple[int, ...]:
    group = problem.heads // problem.kv_heads
    return problem.batch, plan.batch_step, problem.geometry.num_tokens, problem.heads, group


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _keep(dropout_p: float) -> tuple[int, float]:
    return threshold(dropout_p), 1 / (1 - dropout_p)


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
