"""Estimates of layers on a GPU that is not there: the work of their plans over the GPU's rates.

Limits near each other slow each other down: times combine them by a power between a sum and a maximum. It and the
cycles below fit 384 kernels of DiNAT-Mini and of a video model on an H200 within a factor of 1.19 in the mean
(bench/results/nvidia-h200/configs.json). That is a model, good for what binds and for which config needs less of it;
only a GPU tells times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from dinat_triton.kernels.configs import Config, Preset
from dinat_triton.kernels.schedule import Schedule, problem_of, schedule_of
from dinat_triton.layers import Layer
from dinat_triton.offline.inspect import KernelVariant, Report, variants_of
from dinat_triton.offline.targets import Target
from dinat_triton.passes import BIAS, CHUNKS, TRAFFIC, Pass
from dinat_triton.plan import Plan
from dinat_triton.work import BACKWARD, FORWARD, Sweep, Work

# Cycles: a load that nothing hides; a product or a softmax and what waits for it; an item before its first chunk; a
# program before its first item.
LOAD, COMPUTE, ITEM, PROGRAM = 1300, 160, 1500, 5000
TOGETHER = 1.5


@dataclass(frozen=True)
class Step:
    """One main launch of a layer, with the work that its plan makes of it."""

    variant: KernelVariant
    schedule: Schedule
    layer: Layer
    itemsize: int

    @property
    def backward(self) -> bool:
        return self.pass_.is_backward

    @property
    def walks_chunks(self) -> bool:
        constants = self.variant.constants
        one = self.pass_ is Pass.CLOSED_BACKWARD or constants.get("ONE_CHUNK", False)
        return not one and constants.get("ALL_CHUNKS", True)

    @property
    def pass_(self) -> Pass:
        return Pass(self.variant.name)

    @property
    def form(self) -> str:
        """The pass, and which of its forms it is."""
        if not self.variant.constants.get("GRAD_QUERY", True):
            return BIAS
        return CHUNKS if self.variant.constants.get("ALL_CHUNKS") else self.pass_

    @property
    def sweep(self) -> Sweep:
        plan = self.schedule.layout.plan
        assert isinstance(plan, Plan)  # of one geometry
        return Sweep(self.layer, plan.cost(), TRAFFIC[self.form], self.itemsize)

    def limits(self, report: Report, target: Target) -> dict[str, float]:
        """Seconds that each limit alone would take."""
        sweep, options, constants = self.sweep, self.variant.options, self.variant.constants
        traffic, cost = sweep.traffic, sweep.cost
        loaded = (traffic.rows * cost.queries + traffic.columns * cost.col_loads) * sweep.token_bytes
        warps = options["num_warps"]
        steps = sweep.exps / (constants["ROWS"] * constants["CHUNK"])
        tiles = self.schedule.layout.plan.num_tiles * self.layer.maps
        items = tiles if self.walks_chunks else 0  # else a step is an item's only one
        instructions = steps * report.chunk_length + items * report.item_length
        cycles = steps * self._wait() + items * ITEM + prod(self.schedule.grid) * PROGRAM
        return {
            "memory": (sweep.bytes + self._partials()) / target.memory,
            "L2": loaded / target.cache,
            "products": sweep.flops / (target.products if self.itemsize == 2 else target.products32),
            "exps": steps * report.exps * warps * target.warp / target.exps,
            "issue": warps * instructions / target.issues,
            "latency": cycles / (max(1, report.programs) * target.multiprocessors * target.clock),
        }

    def _wait(self) -> int:
        """Cycles of one step in which a program waits.

        Triton issues a round's loads behind the computation before, so those of the next round hide behind nothing.
        """
        rounds_ahead = (self.variant.options["num_stages"] - 1) // (2 if self.walks_chunks else 1)
        return (sum(self.sweep.traffic.products) + 1) * COMPUTE + (LOAD if rounds_ahead < 2 else 0)

    def _partials(self) -> int:
        """Bytes of bias gradients that programs write, and that are read back to be summed."""
        if not (self.variant.constants.get("GRAD_BIAS") or self.pass_ is Pass.CLOSED_BACKWARD):
            return 0
        programs, splits = self.schedule.grid
        return 2 * 4 * programs * splits * self.schedule.layout.pairs


def record(
    layer: Layer, target: Target, dtype: torch.dtype, configs: tuple[Config, ...] = ()
) -> tuple[list[KernelVariant], list[Step]]:
    """Everything that a layer's training step launches, in order, and the main ones of it with their work."""
    variants = variants_of(layer, target, dtype, configs)
    sizes = (layer.batch, layer.heads, layer.heads, layer.dim, layer.dim)
    preset = Preset(target.architecture, configs)
    problem = problem_of(layer.geometry, *sizes, dtype, torch.device("meta"), layer.has_bias, preset=preset)
    steps = [
        Step(variant, schedule_of(problem, Pass(variant.name)), layer, dtype.itemsize)
        for variant in variants
        if variant.name in TRAFFIC
    ]
    return variants, steps


def combined(limits: Iterable[float]) -> float:
    return sum(each**TOGETHER for each in limits) ** (1 / TOGETHER)


def estimate(steps: list[Step], reports: Mapping[KernelVariant, Report], target: Target) -> list[dict[str, Any]]:
    """For the forward and for the backward of one layer: microseconds, what binds, and the floor of memory."""
    found = []
    for backward in (False, True):
        chosen = [step for step in steps if step.backward == backward]
        if not chosen:
            continue
        limits = [step.limits(reports[step.variant], target) for step in chosen]
        layer, first = chosen[0].layer, chosen[0].sweep
        needed = Work.of(BACKWARD if backward else FORWARD, [first])
        found.append(
            {
                "layer": layer.name,
                "heads": layer.heads,
                "batch": layer.batch,
                "pass": "backward" if backward else "forward",
                "us": 1e6 * sum(combined(each.values()) for each in limits),
                "best_us": 1e6 * sum(max(each.values()) for each in limits),
                "binds": [max(each, key=lambda name: each[name]) for each in limits],
                "limits_us": [{k: round(1e6 * v, 2) for k, v in each.items()} for each in limits],
                "kernels": [step.form for step in chosen],
                "floor_us": 1e6 * needed.useful_bytes / target.memory,
                "scores_per_query": first.cost.scores_per_query,
            }
        )
    return found
