"""How long layers would take on a GPU that is not there: the work of their plans over the GPU's rates.

Limits near each other slow each other down: times combine them by their fourth powers. That is a model, good for what
binds and for which config needs less of it; only a GPU tells times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dinat_triton.kernels.configs import PASSES
from dinat_triton.kernels.schedule import Schedule, problem_of, schedule_of
from dinat_triton.layers import Layer
from dinat_triton.offline.inspect import Launch, Report, recording, run_layer
from dinat_triton.offline.targets import Target

# Cycles, much alike on all GPUs: a load that misses L1, one that hits it, a product or a softmax and what waits for it.
LOAD, INDEX, COMPUTE = 700, 250, 250


@dataclass(frozen=True)
class Traffic:
    """What a pass moves and multiplies: tensors of rows and of columns, float32 numbers per row, matrix products."""

    rows: int
    columns: int
    numbers: int
    products: int


TRAFFIC = {
    "forward": Traffic(2, 2, 1, 2),
    "closed_backward": Traffic(3, 4, 1, 5),
    "query_backward": Traffic(3, 2, 3, 3),
    "query_backward chunks": Traffic(4, 2, 3, 3),
    "query_backward bias": Traffic(2, 2, 2, 2),
    "key_backward": Traffic(4, 2, 2, 4),
}


@dataclass(frozen=True)
class Step:
    """One main launch of a layer, with the work that its plan makes of it."""

    launch: Launch
    schedule: Schedule
    layer: Layer
    batch: int
    itemsize: int

    @property
    def backward(self) -> bool:
        return self.launch.name != "forward"

    @property
    def reads_table(self) -> bool:
        constants = self.launch.constants
        return not constants.get("ONE_CHUNK", False) and constants.get("ALL_CHUNKS", True) and self.name in CHUNKED

    @property
    def name(self) -> str:
        return self.launch.name

    @property
    def title(self) -> str:
        """The name, and which of a kernel's forms it is."""
        if not self.launch.constants.get("GRAD_QUERY", True):
            return f"{self.name} bias"
        return f"{self.name} chunks" if self.launch.constants.get("ALL_CHUNKS") else self.name

    def limits(self, report: Report, target: Target) -> dict[str, float]:
        """Seconds that each limit alone would take."""
        traffic = TRAFFIC[self.title]
        cost = self.schedule.layout.plan.cost()
        maps = self.batch * self.layer.heads
        scores = cost.scores * maps
        token = maps * self.layer.dim * self.itemsize
        tensors = (traffic.rows + traffic.columns) * cost.queries * token + 4 * traffic.numbers * cost.queries * maps
        loaded = (traffic.rows * cost.queries + traffic.columns * cost.col_loads) * token
        table = 4 * scores if self.reads_table else 0
        flops = 2 * traffic.products * scores * self.layer.dim
        warps = self.launch.options["num_warps"]
        steps = scores / (self.launch.constants["ROWS"] * self.launch.constants["CHUNK"])
        tiles = self.schedule.layout.plan.num_tiles * maps
        items = tiles if self.reads_table else 0  # else a step is an item's only one
        instructions = steps * report.chunk_length + items * report.item_length
        exchanged = warps * (steps * report.chunk_exchange + items * report.item_exchange)
        # What a program waits for in one step; a pipeline loads ahead, all but the indices.
        wait = (traffic.products + 1) * COMPUTE + (LOAD if self.launch.options["num_stages"] == 1 else 0)
        wait += INDEX if self.reads_table else 0
        return {
            "memory": (tensors + self._partials()) / target.memory,
            "L2": loaded / target.cache,
            # Shared memory is a part of it.
            "L1": (loaded + table + exchanged) / target.nearest_cache,
            "products": flops / (target.products if self.itemsize == 2 else target.products32),
            "exps": steps * report.exps * warps * target.warp / target.exps,
            "issue": warps * instructions / target.issues,
            "latency": steps * wait / (max(1, report.programs) * target.multiprocessors * target.clock),
        }

    def _partials(self) -> int:
        """Bytes of bias gradients that programs write, and that are read back to be summed."""
        if not (self.launch.constants.get("GRAD_BIAS") or self.name == "closed_backward"):
            return 0
        programs, splits = self.schedule.grid
        return 2 * 4 * programs * splits * self.schedule.layout.pairs


CHUNKED = ("forward", "query_backward", "key_backward")


def record(layer: Layer, target: Target, dtype: torch.dtype, batch: int) -> tuple[list[Launch], list[Step]]:
    """Everything that a layer's training step launches, in order, and the main ones of it with their work."""
    with recording(target) as launches:
        run_layer(layer, dtype, batch)
        sizes = (batch, layer.heads, layer.heads, layer.dim, layer.dim)
        problem = problem_of(layer.geometry, *sizes, dtype, torch.device("meta"))
        steps = [
            Step(launch, schedule_of(problem, launch.name), layer, batch, dtype.itemsize)
            for launch in launches
            if launch.name in PASSES
        ]
    return launches, steps


def combined(limits: Iterable[float]) -> float:
    return sum(each**4 for each in limits) ** 0.25


def estimate(steps: list[Step], reports: Mapping[Launch, Report], target: Target) -> list[dict[str, Any]]:
    """For the forward and for the backward of one layer: microseconds, what binds, and the floor of memory."""
    found = []
    for backward in (False, True):
        chosen = [step for step in steps if step.backward == backward]
        limits = [step.limits(reports[step.launch], target) for step in chosen]
        if not chosen:
            continue
        layer = chosen[0].layer
        token_bytes = chosen[0].batch * layer.heads * layer.dim * chosen[0].itemsize
        floor = (7 if backward else 4) * layer.geometry.num_tokens * token_bytes / target.memory
        found.append(
            {
                "layer": layer.name,
                "heads": layer.heads,
                "batch": chosen[0].batch,
                "pass": "backward" if backward else "forward",
                "us": 1e6 * sum(combined(each.values()) for each in limits),
                "best_us": 1e6 * sum(max(each.values()) for each in limits),
                "binds": [max(each, key=lambda name: each[name]) for each in limits],
                "limits_us": [{k: round(1e6 * v, 2) for k, v in each.items()} for each in limits],
                "kernels": [step.title for step in chosen],
                "floor_us": 1e6 * floor,
                "scores_per_query": chosen[0].schedule.layout.plan.cost().scores_per_query,
            }
        )
    return found
