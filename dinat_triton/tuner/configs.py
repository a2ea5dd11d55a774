"""Tunes the Triton kernels: on the GPU that is here, or by the model of one that is not.

A config is dropped if its plan costs too much, then if the compiler made something of it that must not ship, as the
inspector sees it; what is left is ranked by the estimate. On a GPU the first of them then run: checked against a wider
precision, and timed side by side. Without one the estimate decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product, zip_longest
from math import inf
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import triton

from dinat_triton import store
from dinat_triton.kernels import prepare, schedule
from dinat_triton.kernels.configs import Architecture, Config, choose_config, choose_plan, padded, plan_cost, rule
from dinat_triton.offline.estimate import Step, estimate, record
from dinat_triton.offline.inspect import Launch, Report, inspect
from dinat_triton.offline.targets import TARGETS, Target
from dinat_triton.progress import ProgressBar
from dinat_triton.tuner.layer_run import LayerRun
from dinat_triton.tuner.search import LEAST_ROUNDS, ROUNDS, Budget, Race, Rejection, Work, combined, race, shortlist

Configs = dict[str, Config]  # by pass
# Whether tiles can be closed decides which kernels a backward runs at all, so that pass comes last.
PASSES = ("forward", "query_backward", "key_backward", "closed_backward")
ROWS = CHUNKS = (16, 32, 64, 128)
ONE_CHUNKS = (32, 64, 128)
WARPS = (2, 4, 8)
STAGES = (1, 2)
# Scores of a step that each thread computes: fewer leave it idle, more do not fit its registers.
LEAST_SCORES, MOST_SCORES = 4, 64
# How much more than the best plan another may cost: what it saves elsewhere does not make up for more.
MOST_COST = 1.5
# What the model cannot tell apart is left to the clock.
UNMODELLED: tuple[dict[str, int], ...] = ({"stages": 3}, {"programs": 4}, {"programs": 16})
# Configs of a layer's pass that are timed, as the budget allows, and seconds that each takes in all its rounds.
FEWEST, MOST, RACE_SECONDS = 4, 16, 0.3
# Configs that are timed on all layers, to find the one for layers that nobody tuned.
GENERAL = 3
# Kernels that wait for a compiler, at most.
AHEAD = 24
# Compiling may take this share of the budget if what it finds is timed afterwards, and this share if not.
COMPILING = {True: 0.5, False: 0.9}
# The tables of an architecture ship for others too: their kernels differ in shared memory alone.
ALIKE = {"sm_80": ("sm_86", "sm_89", "sm_120")}


@contextmanager
def in_use(configs: Mapping[str, Config]) -> Iterator[None]:
    """Launches take these configs, whatever the tables say."""
    with mock.patch.object(schedule, "choose_config", lambda name, *_: configs[name]):
        try:
            prepare.forget()
            yield
        finally:
            prepare.forget()


@contextmanager
def private_cache() -> Iterator[None]:
    """Triton compiles into a folder that is gone afterwards: the user's cache gets no kernels that nobody will launch.

    The compilers beside this process share the folder, so what they inspected is not compiled again to be timed.
    """
    with TemporaryDirectory(prefix="dinat-triton-") as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        yield


def target_of(architecture: Architecture) -> Target:
    """What the model needs to know of a GPU; of one that it does not know, its nearest relative's rates."""
    family = sorted((t for t in TARGETS.values() if t.is_amd == architecture.is_amd), key=lambda t: _generation(t.name))
    older = [t for t in family if _generation(t.name) <= _generation(architecture.name)]
    nearest = older[-1] if older else family[0]
    return replace(
        nearest, name=architecture.name, shared=architecture.shared_memory, multiprocessors=architecture.multiprocessors
    )


def _generation(name: str) -> int:
    return int(name.removeprefix("sm_").removeprefix("gfx"), 16)


# Candidates


def candidates(name: str, works: Sequence[Work], bits: int, warp: int) -> list[Config]:
    """Configs whose plans cost little more than the best one over all works; the best plan's come first.

    Args:
        name: The pass.
        works: What they are for.
        bits: Width of the dtype.
        warp: Threads of a warp.
    """
    token_bytes = works[0].layer.dim * bits // 8
    plans: dict[tuple, tuple[float, int, Config]] = {}
    for rows, chunk, one_chunk in product(ROWS, CHUNKS, ONE_CHUNKS):
        config = Config(rows=rows, chunk=chunk, one_chunk=one_chunk)
        each = [choose_plan(work.layer.geometry, config, token_bytes, name == "key_backward") for work in works]
        cost = sum(w.weight * w.maps * plan_cost(plan, token_bytes) for w, plan in zip(works, each, strict=True))
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


# What a config would take

NOT_COMPILED = Rejection("was not compiled within the budget")


class Model:
    """Predicts what configs take on an architecture, from their plans and from what the compiler makes of them.

    Args:
        target: The architecture.
        dtype: Of all tensors.
        submit: Begins to compile a launch and to read the result.
        shared: Bytes of shared memory that a program may use, if fewer than the architecture has.
    """

    def __init__(
        self, target: Target, dtype: torch.dtype, submit: Callable[[Launch], Future[Report]], shared: int | None = None
    ):
        self.target, self.dtype, self.submit = target, dtype, submit
        self.shared = target.shared if shared is None else shared
        self.compiled: dict[Launch, Future[Report]] = {}
        self._steps: dict[tuple, list[Step]] = {}

    def steps(self, work: Work, name: str, configs: Configs) -> list[Step]:
        """The launches of a pass. What closed tiles save is the other passes, so theirs are all of the backward's."""
        closed = name == "closed_backward"
        key = (work, name, *(configs[each] for each in (PASSES if closed else (name,))))
        if key not in self._steps:
            with in_use(configs):
                steps = record(work.layer, self.target, self.dtype, work.batch)[1]
            self._steps[key] = [step for step in steps if (step.backward if closed else step.name == name)]
        return self._steps[key]

    def want(self, work: Work, name: str, configs: Configs, budget: Budget) -> None:
        """Has compiled what a config would launch. Does not run far ahead of the compilers: they need the cores."""
        for step in self.steps(work, name, configs):
            if step.launch not in self.compiled:
                self.compiled[step.launch] = self.submit(step.launch)
                if len(self.pending) > AHEAD:
                    wait(self.pending, budget.left, FIRST_COMPLETED)

    @property
    def pending(self) -> list[Future[Report]]:
        return [future for future in self.compiled.values() if not future.done()]

    def finish(self, budget: Budget) -> int:
        """Waits until all is compiled or the budget is spent; what is not begun then never will be. Counts the rest."""
        wait(self.pending, budget.left)
        return sum(future.cancel() or not future.done() for future in self.compiled.values())

    def report(self, launch: Launch) -> Report | Rejection:
        future = self.compiled.get(launch)
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

    def predict(self, work: Work, name: str, configs: Configs) -> float | Rejection:
        """Seconds of a pass, if its kernels may be launched at all."""
        steps = self.steps(work, name, configs)
        reports: dict[Launch, Report] = {}
        for step in steps:
            report = self.report(step.launch)
            if isinstance(report, Rejection):
                return report
            reports[step.launch] = report
        return 1e-6 * sum(found["us"] for found in estimate(steps, reports, self.target))

    def tightened(self, work: Work, name: str, configs: Configs) -> Config:
        """The config with so few registers that a multiprocessor has room for one more program."""
        step = self.steps(work, name, configs)[0]
        report = self.report(step.launch)
        if isinstance(report, Rejection):
            return configs[name]
        threads = step.launch.options["num_warps"] * self.target.warp
        room = self.target.registers // (threads * (report.programs + 1)) // 8 * 8
        return replace(configs[name], registers=min(room, report.registers))


# What it does take


class Clock:
    """Runs a layer on the device under one config after the other. A wrong result rejects a config."""

    def __init__(self, run: LayerRun):
        self.run = run
        self.found_wrong: dict[tuple, str | None] = {}

    def score(self, name: str, configs: Configs) -> float | Rejection:
        key = tuple(configs[each] for each in PASSES)
        try:
            with in_use(configs):
                if key not in self.found_wrong:
                    self.found_wrong[key] = self.run.check()
                if wrong := self.found_wrong[key]:
                    return Rejection(wrong)
                return self.run.seconds(backward=name != "forward")
        except Exception as error:  # whatever a compiler or a driver may say of one config, the others can be tried
            return Rejection(f"cannot run: {first_line(error)}")


def first_line(error: BaseException) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:200]


# The search


@dataclass(frozen=True)
class Row:
    """What tuning did for a pass of a layer. Seconds are measured, or the model's; infinite if rejected before."""

    work: Work
    name: str
    before: float
    after: float
    config: Config
    own: bool  # the layer has a config of its own


@dataclass
class Found:
    """What a search found.

    Attributes:
        entries: For the table, by key: configs, and None where a key needs none of its own any more.
        rows: What changes by them.
        wrong: What was rejected although it compiled well, and why.
        unseen: Configs of single layers that the budget did not allow to compile, of all that there are.
        unreached: Layers that the budget did not allow to tune.
    """

    entries: dict[str, dict[str, int] | None] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unseen: tuple[int, int] = (0, 0)
    unreached: list[Work] = field(default_factory=list)


@dataclass
class Search:
    """Of the configs of some layers with one head dim and dtype.

    Attributes:
        works: The layers.
        model: Ranks configs.
        budget: Of all of it.
        device: Name of the GPU that is here, empty where there is none.
        clock_of: Runs a layer; None without a GPU.
        general: Whether to look for the config of all other layers, too.
        bar: Makes a progress bar.
    """

    works: Sequence[Work]
    model: Model
    budget: Budget
    device: str = ""
    clock_of: Callable[[Work], Clock] | None = None
    general: bool = True
    bar: Callable[[int], ProgressBar] | None = ProgressBar

    def __post_init__(self) -> None:
        self.bits = torch.finfo(self.model.dtype).bits
        self.dim = padded(self.works[0].layer.dim)
        self.arch = self.model.target.name
        self.own = {
            (name, work): candidates(name, [work], self.bits, self.model.target.warp)
            for name in PASSES
            for work in self.works
        }
        self.shared = {
            name: candidates(name, self.works, self.bits, self.model.target.warp) if self.general else []
            for name in PASSES
        }
        self.wanted: set[tuple[str, Work, Config]] = set()
        self.races: dict[str, dict[Work, Race[Config]]] = {name: {} for name in PASSES}

    def run(self) -> Found:
        found = Found()
        compiling = self.budget.share(COMPILING[self.clock_of is not None])
        promise = self._in_order_of_promise()
        progress = self.bar(len(promise)) if self.bar else None
        for name, work, config in promise:
            if compiling.is_spent:
                break
            self.model.want(work, name, self.start(work) | {name: config}, compiling)
            self.wanted.add((name, work, config))
            if progress:
                progress.step("configs compiled and inspected")
        if progress:
            progress.close()
        self.model.finish(compiling)
        found.unseen = len(promise) - len(self.wanted), len(promise)
        shortlists = {name: self._shared_shortlist(name) for name in PASSES}
        progress = self.bar(len(self.works)) if self.bar else None
        for number, work in enumerate(self.works):
            if self.budget.is_spent:
                found.unreached.append(work)
                continue
            found.wrong += self._tune(work, shortlists, self.budget.share(1 / (len(self.works) - number)))
            if progress:
                progress.step(work.label)
        if progress:
            progress.close()
        for name in PASSES:
            self._decide(name, found)
        return found

    # What there is to choose from

    def start(self, work: Work) -> Configs:
        """What a layer is set against: what it has now. The model only knows enough to say what is not the rule."""
        return {name: self.in_use(name, work) if self.clock_of else self.default(name) for name in PASSES}

    def in_use(self, name: str, work: Work | None = None) -> Config:
        """What a layer gets now, or a layer that nobody tuned."""
        own = () if work is None else (work.layer.geometry, work.maps)
        return choose_config(name, self.dim, self.bits, self.arch, self.device, *own)

    def default(self, name: str) -> Config:
        return self.in_use(name) if self.clock_of else rule(name, self.dim, self.bits)

    def known(self, name: str, work: Work) -> list[Config]:
        """What others are set against."""
        return [self.start(work)[name], self.in_use(name, work), self.in_use(name), self.default(name)]

    def applies(self, name: str, work: Work) -> bool:
        """Whether the layer has that pass, and for closed tiles, whether it could."""
        start = self.start(work)
        if name != "closed_backward":
            return bool(self.model.steps(work, name, start))
        configs = [start[name], *self.own[name, work][:1]]
        each = [self.model.steps(work, name, start | {name: config}) for config in configs]
        return any(step.name == name for steps in each for step in steps)

    def _in_order_of_promise(self) -> list[tuple[str, Work, Config]]:
        """First what is in use, then every list's best, then every list's second: the budget may end any time."""
        lists = []
        for name, work in product(PASSES, self.works):
            if self.applies(name, work):
                lists.append([(name, work, config) for config in [*self.known(name, work), *self.own[name, work]]])
                lists.append([(name, work, config) for config in self.shared[name]])
        ordered = (wanted for each in zip_longest(*lists) for wanted in each if wanted is not None)
        return list(dict.fromkeys(ordered))

    def _shared_shortlist(self, name: str) -> list[Config]:
        """What promises most for all layers together."""
        works = [work for work in self.works if self.applies(name, work)]
        totals: dict[Config, float | Rejection] = {}
        for config in self.shared[name] if works else []:
            if not all((name, work, config) in self.wanted for work in works):
                continue
            each = {work: self.model.predict(work, name, self.start(work) | {name: config}) for work in works}
            why = next((seconds for seconds in each.values() if isinstance(seconds, Rejection)), None)
            totals[config] = why or sum(work.weight * t for work, t in each.items() if not isinstance(t, Rejection))
        return shortlist(totals, GENERAL if self.clock_of else len(totals))

    # One layer

    def _tune(self, work: Work, shared: Mapping[str, list[Config]], budget: Budget) -> list[str]:
        """Races the configs of every pass; the next pass runs with the winner. Returns what was found to be wrong."""
        chosen, wrong = self.start(work), []
        clock = self.clock_of(work) if self.clock_of else None
        passes = [name for name in PASSES if self.applies(name, work)]
        for number, name in enumerate(passes):
            share = budget.share(1 / (len(passes) - number))

            def configs(config: Config, name: str = name) -> Configs:
                return chosen | {name: config}

            def predict(config: Config, name: str = name) -> float | Rejection:
                return self.model.predict(work, name, configs(config))

            def clocked(config: Config, name: str = name) -> float | Rejection:
                assert clock is not None
                return clock.score(name, configs(config))

            seen = [config for config in self.own[name, work] if (name, work, config) in self.wanted]
            own = {config: predict(config) for config in seen}
            fixed = [*self.known(name, work), *shared[name]]
            if clock is None:
                finished = race([*fixed, *own], predict, share, rounds=1)
            else:
                most = int(share.left / RACE_SECONDS)
                promising = shortlist(own, min(max(most, FEWEST), MOST))
                variants = [replace(promising[0], **change) for change in UNMODELLED] if promising else []
                variants += [self.model.tightened(work, name, configs(config)) for config in promising[:1]]
                finished = self._race_distinct(work, name, configs, [*fixed, *promising, *variants], clocked, share)
                wrong += [f"{work.label} {name} {config}: {why}" for config, why in finished.rejected.items()]
            self.races[name][work] = finished
            chosen[name] = finished.winner(chosen[name], self.rounds)
        return wrong

    def _race_distinct(
        self,
        work: Work,
        name: str,
        configs: Callable[[Config], Configs],
        choices: Iterable[Config],
        score: Callable[[Config], float | Rejection],
        budget: Budget,
    ) -> Race[Config]:
        """Races configs; those that come to the same launches run once."""
        alike: dict[tuple, list[Config]] = {}
        for config in dict.fromkeys(choices):
            steps = self.model.steps(work, name, configs(config))
            key = tuple((step.launch, step.schedule.grid, step.schedule.batch_step) for step in steps)
            alike.setdefault(key, []).append(config)
        finished = race([first for first, *_ in alike.values()], score, budget, ROUNDS)
        for first, *others in alike.values():
            finished.seconds |= dict.fromkeys(others, finished.seconds[first])
        return finished

    @property
    def rounds(self) -> int:
        return LEAST_ROUNDS if self.clock_of else 1

    # All layers

    def _decide(self, name: str, found: Found) -> None:
        """The config for layers in general, and those that single layers get because it is not good enough for them."""
        races, key = self.races[name], f"{name}/{self.dim}/{self.bits}"
        works = [work for work in self.works if self.applies(name, work)]
        general = None
        if self.general and works and all(work in races for work in works):
            together = combined(races)
            winner = together.winner(self.default(name), self.rounds)
            if winner in together.seconds:
                general = winner
                found.entries[key] = asdict(general)
        for work, finished in races.items():
            now = self.in_use(name, work)
            default = now if general is None else general
            config = finished.winner(default, self.rounds)
            own = config != default
            if own or general is not None:
                own_key = f"{key}/{store.geometry_key(work.layer.geometry)}/{work.maps}"
                found.entries[own_key] = asdict(config) if own else None
            if not self.clock_of and finished.rejected.get(now, NOT_COMPILED.reason) != NOT_COMPILED.reason:
                found.wrong.append(f"{work.label} {name} {now}, which is in use: {finished.rejected[now]}")
            if finished.seconds.get(config):
                before = finished.median(now) if finished.seconds.get(now) else inf
                found.rows.append(Row(work, name, before, finished.median(config), config, own))


def tune_modelled(
    works: Sequence[Work], dtype: torch.dtype, target: Target, budget: Budget, *, general: bool, jobs: int
) -> Found:
    """Finds configs for a GPU that need not be here. Nothing runs, so no result is checked."""
    shared = min([target.shared, *(TARGETS[other].shared for other in ALIKE.get(target.name, ()))])
    with compilers(jobs) as pool:
        model = Model(target, dtype, partial(_submit, pool, target), shared)
        return Search(works, model, budget, general=general).run()


def tune_measured(
    works: Sequence[Work],
    dtype: torch.dtype,
    device: torch.device,
    architecture: Architecture,
    budget: Budget,
    *,
    general: bool,
    jobs: int,
) -> Found:
    """Finds configs for the GPU that is here."""
    target = target_of(architecture)

    def clock_of(work: Work) -> Clock:
        return Clock(LayerRun(work.layer, work.batch, dtype, device, "triton"))

    with compilers(jobs) as pool:
        model = Model(target, dtype, partial(_submit, pool, target))
        return Search(works, model, budget, architecture.device, clock_of, general).run()


@contextmanager
def compilers(jobs: int) -> Iterator[Executor]:
    """Processes that compile; their Triton caches are private, and this process shares them."""
    with private_cache():
        pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _submit(pool: Executor, target: Target, launch: Launch) -> Future[Report]:
    return pool.submit(inspect, launch, target)


def shipped(entries: Mapping[str, Config]) -> dict[str, dict[str, int]]:
    """Entries as they go into `kernels/tuned/`: without those that only say what the rule says anyway."""

    def is_rule(key: str, config: Config) -> bool:
        name, dim, bits, *own = key.split("/")
        return not own and config == rule(name, int(dim), int(bits))

    return {key: asdict(config) for key, config in entries.items() if not is_rule(key, config)}
