"""Configs of the kernels that are worth trying, and what the model of a GPU says they would take.

A config is dropped if its plan costs too much, then if the compiler made something of it that must not ship, as the
inspector sees it; the estimate ranks those left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from tempfile import TemporaryDirectory

import torch
import triton

from dinat_triton.kernels.configs import Config, choose_plan, plan_cost
from dinat_triton.layers import Layer
from dinat_triton.offline.estimate import Step, estimate, record
from dinat_triton.offline.inspect import KernelVariant, Report, inspect
from dinat_triton.offline.targets import Target
from dinat_triton.passes import Pass
from dinat_triton.tuner.layer_run import first_line
from dinat_triton.tuner.search import Budget, Rejection

Configs = dict[Pass, Config]
Submit = Callable[[KernelVariant], "Future[Report]"]
ROWS = CHUNKS = (16, 32, 64, 128)
ONE_CHUNKS = (32, 64, 128)
WARPS = (1, 2, 4, 8)
# Triton issues the loads of a round behind the computation of the one before: two stages wait for all of them. Three
# load during a computation, and five where the addresses are loaded, too.
STAGES = (1, 3, 5)
# Scores of a step that each thread computes: fewer leave it idle, more do not fit its registers.
LEAST_SCORES, MOST_SCORES = 4, 64
# How much more than the best plan another may cost: what it saves elsewhere does not make up for more.
MOST_COST = 1.5
# Kernels that wait for a compiler, at most.
AHEAD = 24
NOT_COMPILED = Rejection("was not compiled within the budget")


def candidates(pass_: Pass, layers: Sequence[Layer], bits: int, warp: int) -> list[Config]:
    """Configs whose plans cost little more than the best one over all layers; the best plan's come first.

    Args:
        pass_: What they are for.
        layers: Layers that they are for.
        bits: Width of the dtype.
        warp: Threads of a warp.
    """
    token_bytes = layers[0].dim * bits // 8
    plans: dict[tuple, tuple[float, int, Config]] = {}
    for rows, chunk, one_chunk in product(ROWS, CHUNKS, ONE_CHUNKS):
        config = Config(rows=rows, chunk=chunk, one_chunk=one_chunk)
        each = [choose_plan(layer.geometry, config, token_bytes, pass_.over_keys) for layer in layers]
        cost = sum(x.count * x.maps * plan_cost(plan, token_bytes) for x, plan in zip(layers, each, strict=True))
        scores = max(plan.block * plan.chunk for plan in each if plan.block)
        # Many configs come to the same plans.
        plans.setdefault(tuple((*plan.tile, plan.block, plan.chunk) for plan in each), (cost, scores, config))
    most = MOST_COST * min(cost for cost, _, _ in plans.values())
    return [
        replace(config, warps=warps, stages=stages)
        for cost, scores, config in sorted(plans.values(), key=lambda plan: plan[0])
        for warps, stages in product(WARPS, STAGES)
        if cost <= most and LEAST_SCORES <= scores / (warps * warp) <= MOST_SCORES
    ]


def in_order(configs: Mapping[Pass, Config]) -> tuple[Config, ...]:
    """Configs as a Preset holds them."""
    return tuple(configs[pass_] for pass_ in Pass)


class Model:
    """Predicts what configs take on a GPU, from their plans and from what the compiler makes of them.

    Args:
        target: The GPU.
        dtype: Dtype of all tensors.
        submit: Begins to compile a kernel and to read the result.
        shared: Bytes of shared memory that a program may use, if fewer than the GPU has.
    """

    def __init__(self, target: Target, dtype: torch.dtype, submit: Submit, shared: int | None = None):
        self.target, self.dtype, self.submit = target, dtype, submit
        self.shared = target.shared if shared is None else shared
        self.compiled: dict[KernelVariant, Future[Report]] = {}
        self._steps: dict[tuple, list[Step]] = {}

    def steps(self, layer: Layer, pass_: Pass, configs: Configs) -> list[Step]:
        """The launches of a pass. What closed tiles save is the other passes, so theirs are all of the backward's."""
        closed = pass_ is Pass.CLOSED_BACKWARD
        key = (layer, pass_, *(in_order(configs) if closed else [configs[pass_]]))
        if key not in self._steps:
            _, steps = record(layer, self.target, self.dtype, in_order(configs))
            self._steps[key] = [step for step in steps if (step.backward if closed else step.pass_ is pass_)]
        return self._steps[key]

    def want(self, layer: Layer, pass_: Pass, configs: Configs, budget: Budget) -> None:
        """Has compiled what a config would launch. Does not run far ahead of the compilers: they need the cores."""
        for step in self.steps(layer, pass_, configs):
            if step.variant not in self.compiled:
                self.compiled[step.variant] = self.submit(step.variant)
                if len(self.pending) > AHEAD:
                    wait(self.pending, budget.left, FIRST_COMPLETED)

    @property
    def pending(self) -> list[Future[Report]]:
        return [future for future in self.compiled.values() if not future.done()]

    def finish(self, budget: Budget) -> None:
        """Waits until all is compiled or the budget is spent; what is not begun then never will be."""
        wait(self.pending, budget.left)
        for future in self.pending:
            future.cancel()

    def report(self, variant: KernelVariant) -> Report | Rejection:
        future = self.compiled.get(variant)
        if future is None or future.cancelled() or not future.done():
            return NOT_COMPILED
        if error := future.exception():
            return Rejection(f"does not compile: {first_line(error)}")
        report = future.result()
        if report.complaints:
            return Rejection(report.complaints[0])
        if report.shared > self.shared:
            return Rejection(f"needs {report.shared} bytes of shared memory, {self.shared} may be used")
        return report

    def predict(self, layer: Layer, pass_: Pass, configs: Configs) -> float | Rejection:
        """Seconds of a pass, if its kernels may be launched at all."""
        steps = self.steps(layer, pass_, configs)
        reports: dict[KernelVariant, Report] = {}
        for step in steps:
            report = self.report(step.variant)
            if isinstance(report, Rejection):
                return report
            reports[step.variant] = report
        return 1e-6 * sum(found["us"] for found in estimate(steps, reports, self.target))

    def tightened(self, layer: Layer, pass_: Pass, configs: Configs) -> Config:
        """The config with so few registers that a multiprocessor has room for one more program."""
        step = self.steps(layer, pass_, configs)[0]
        report = self.report(step.variant)
        if isinstance(report, Rejection):
            return configs[pass_]
        threads = step.variant.options["num_warps"] * self.target.warp
        room = self.target.registers // (threads * (report.programs + 1)) // 8 * 8
        return replace(configs[pass_], registers=min(room, report.registers))


@contextmanager
def private_cache() -> Iterator[None]:
    """Lets Triton compile into a folder that is gone afterwards: nobody will launch those kernels again."""
    with TemporaryDirectory(prefix="dinat-triton-") as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        yield


@contextmanager
def compilers(target: Target, jobs: int) -> Iterator[Submit]:
    """Processes that compile. They share this one's cache: what they inspected is not compiled again to be timed."""
    with private_cache():
        pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
        try:
            yield partial(_submit, pool, target)
        finally:
            pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, target: Target, variant: KernelVariant) -> Future[Report]:
    return pool.submit(inspect, variant, target)
