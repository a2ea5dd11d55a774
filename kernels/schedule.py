"""Schedules: how a kernel goes about a problem."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton

from dinat_triton.geometry import Geometry
from dinat_triton.kernels.configs import (
    ALL_REGISTERS,
    Architecture,
    Config,
    Preset,
    architecture_of,
    choose_config,
    choose_plan,
    padded,
)
from dinat_triton.kernels.layout import Layout, layout_of
from dinat_triton.kernels.map_plans import MapPlans, choose_plans
from dinat_triton.map_batch import MapBatch
from dinat_triton.passes import Pass
from dinat_triton.plan import Plan

# Multiply and add in one instruction; what Triton does by default differs from version to version.
FUSION = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Problem:
    """All that schedules depend on."""

    geometry: Geometry | MapBatch  # a batch of maps of different sizes is one batch item
    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    architecture: Architecture
    biased: bool
    precision: str  # of float32 products
    wide: bool  # token addresses within a batch item need 64 bits
    configs: tuple[Config, ...]  # one for each Pass; empty to take those of the tables

    @property
    def bits(self) -> int:
        return torch.finfo(self.dtype).bits


@dataclass(frozen=True)
class Schedule:
    """A kernel's way through a problem: its plan on the device, its grid, and its compile-time options."""

    layout: Layout
    batch_step: int
    grid: tuple[int, ...]
    options: dict[str, Any]

    @property
    def one_chunk(self) -> bool:
        return self.layout.max_chunks == 1


def problem_of(
    geometry: Geometry | MapBatch, batch: int, heads: int, kv_heads: int, dim: int, value_dim: int,
    dtype: torch.dtype, device: torch.device, biased: bool = True, tf32: bool = False, wide: bool = False,
    preset: Preset | None = None,
) -> Problem:  # fmt: skip
    """The problem of tensors of these sizes, here or on the GPU of a preset."""
    preset = preset or Preset()
    architecture = preset.architecture or architecture_of(device)
    # AMD has no tf32x3.
    precision = "tf32x3" if tf32 and not architecture.is_amd else "ieee"
    if triton.knobs.runtime.interpret:
        precision = "interpreted"
    sizes = (batch, heads, kv_heads, dim, value_dim)
    return Problem(geometry, *sizes, dtype, device, architecture, biased, precision, wide, preset.configs)


def config_of(problem: Problem, pass_: Pass) -> Config:
    if problem.configs:
        return problem.configs[list(Pass).index(pass_)]
    architecture, geometry, maps = problem.architecture, problem.geometry, problem.batch
    if isinstance(geometry, MapBatch):
        maps, geometry = len(geometry.geometries), geometry.largest
    dim, gpu = max(padded(problem.dim), padded(problem.value_dim)), (architecture.name, architecture.device)
    return choose_config(pass_, dim, problem.bits, *gpu, geometry, maps * problem.heads, problem.biased)


def plan_of(problem: Problem, pass_: Pass) -> Plan | MapPlans:
    geometry, config, token_bytes = problem.geometry, config_of(problem, pass_), problem.dim * problem.bits // 8
    if isinstance(geometry, MapBatch):
        return choose_plans(geometry, config, token_bytes, pass_.over_keys)
    return choose_plan(geometry, config, token_bytes, pass_.over_keys)


def schedule_of(problem: Problem, pass_: Pass) -> Schedule:
    """Shares a problem's work out among programs: over the batch first, then over tiles of one class."""
    architecture, config, plan = problem.architecture, config_of(problem, pass_), plan_of(problem, pass_)
    heads = problem.kv_heads if pass_.over_keys else problem.heads
    work = plan.num_tiles * heads * problem.batch
    items = max(1, work // (config.programs * architecture.multiprocessors))  # tiles of one batch item, per program
    batch_step = min(items, problem.batch)
    # Powers of two, so that batches of any size share few layouts.
    tiles_per_run = 1 << max(0, (items // problem.batch).bit_length() - 1)
    layout = layout_of(plan, tiles_per_run, problem.biased, problem.wide, problem.device)
    warps = min(config.warps, _room(architecture, problem.bits, layout.row_slots, plan.chunk))
    options = {
        "D": problem.dim,
        "DV": problem.value_dim,
        "ROWS": layout.row_slots,
        "CHUNK": plan.chunk,
        "LONG_AXIS": layout.has_long_axis,
        "PRECISION": problem.precision,
        "num_warps": warps,
        "num_stages": config.stages,
    } | FUSION
    # A bound makes room for programs of all the config's warps; smaller tiles and their fewer warps do without.
    if config.registers < ALL_REGISTERS and warps == config.warps and not architecture.is_amd:
        options["maxnreg"] = config.registers
    if architecture.is_amd:
        options["matrix_instr_nonkdim"] = 16
    grid = (len(layout.runs) * heads, triton.cdiv(problem.batch, batch_step))
    return Schedule(layout, batch_step, grid, options)


def _room(architecture: Architecture, bits: int, rows: int, chunk: int) -> int:
    """Warps among which Triton can share a chunk out: further ones would repeat what others do.

    It gives each 16 rows, and columns where there are no more rows, but not to AMD's matrix units. Those of gfx9 alone
    take float32.
    """
    by_columns = not architecture.is_amd or (bits == 32 and not architecture.name.startswith("gfx9"))
    return chunk // 8 if rows == 16 and by_columns else rows // 16


def has_closed_backward(problem: Problem) -> bool:
    """Whether one pass does the whole backward: no two tiles share a key, and no two heads do."""
    if problem.heads != problem.kv_heads:
        return False
    geometry, config = problem.geometry, config_of(problem, Pass.CLOSED_BACKWARD)
    geometries = geometry.geometries if isinstance(geometry, MapBatch) else (geometry,)
    columns = max(prod(axis.closed_columns for axis in each.axes) for each in geometries)
    if columns > max(config.chunk, config.one_chunk):
        return False
    plan = plan_of(problem, Pass.CLOSED_BACKWARD)
    return plan.largest[1] <= plan.chunk and plan.is_closed
