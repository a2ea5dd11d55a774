"""Tunes the Triton kernels: on the GPU that is here, or by the model of one that is not.

The model ranks configs. On a GPU the first of them then run: checked against a wider precision, and timed side by side.
Without one the estimate decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product, zip_longest
from math import inf

import torch
from tqdm import tqdm

from dinat_triton import store
from dinat_triton.kernels import attention
from dinat_triton.kernels.configs import LIKE, Config, Preset, choose_config, is_closed, padded, rule, table_key
from dinat_triton.layers import Layer
from dinat_triton.offline.targets import TARGETS, Target
from dinat_triton.passes import Pass
from dinat_triton.tuner.layer_run import LayerRun
from dinat_triton.tuner.model import NOT_COMPILED, Configs, Model, candidates, compilers, in_order
from dinat_triton.tuner.search import (
    LEAST_ROUNDS,
    ROUNDS,
    Budget,
    Found,
    Race,
    Rejection,
    Row,
    combined,
    layer_by_layer,
    race,
    shared_out,
    shortlist,
)

# Whether tiles can be closed decides which kernels a backward runs at all, so that pass comes last.
IN_TURN = (Pass.FORWARD, Pass.QUERY_BACKWARD, Pass.KEY_BACKWARD, Pass.CLOSED_BACKWARD)
# What the model cannot tell apart is left to the clock.
UNMODELLED: tuple[dict[str, int], ...] = ({"programs": 4}, {"programs": 16}, {"programs": 32}, {"programs": 64})
# Configs of a layer's pass that are timed, as the budget allows, and seconds that each takes in all its rounds.
FEWEST, MOST, RACE_SECONDS = 4, 32, 0.3
# Configs that are timed on all layers, to find the one for layers that nobody tuned.
GENERAL = 3
# Compiling may take this share of the budget if what it finds is timed afterwards, and this share if not.
COMPILING = {True: 0.5, False: 0.9}

# Seconds of a pass of one layer under configs, or why they must not be taken.
Clock = Callable[[Pass, Configs], float | Rejection]


@dataclass
class KernelSearch:
    """The search for the configs of some layers with one head dim and dtype.

    Attributes:
        layers: The layers: with closed tiles, or without.
        model: Ranks configs.
        budget: Time for all of it.
        clock_of: Times a layer; None without a GPU.
        general: Whether to look for the config of all other layers, too.
    """

    layers: Sequence[Layer]
    model: Model
    budget: Budget
    clock_of: Callable[[Layer], Clock] | None = None
    general: bool = True

    def __post_init__(self) -> None:
        self.bits = torch.finfo(self.model.dtype).bits
        self.dim, self.biased = padded(self.layers[0].dim), self.layers[0].has_bias
        self.closed = is_closed(self.layers[0].geometry)
        self.rounds = LEAST_ROUNDS if self.clock_of else 1
        warp = self.model.target.warp
        self.own = {
            (pass_, layer): candidates(pass_, [layer], self.bits, warp)
            for pass_, layer in product(IN_TURN, self.layers)
        }
        self.shared = {
            pass_: candidates(pass_, self.layers, self.bits, warp) if self.general else [] for pass_ in IN_TURN
        }
        self.wanted: set[tuple[Pass, Layer, Config]] = set()
        self.races: dict[Pass, dict[Layer, Race[Config]]] = {pass_: {} for pass_ in IN_TURN}

    def run(self) -> tuple[Found, tuple[int, int]]:
        """The results, and how many configs of layers the budget allowed to look at, of how many."""
        found = Found()
        promise = self._in_order_of_promise()
        self._compile(promise)
        shared = {pass_: self._shared_shortlist(pass_) for pass_ in IN_TURN}
        for layer, share in layer_by_layer(self.layers, self.budget, found):
            found.wrong += self._tune(layer, shared, share)
        for pass_ in IN_TURN:
            self._decide(pass_, found)
        return found, (len(self.wanted), len(promise))

    # What there is to choose from

    def start(self, layer: Layer) -> Configs:
        """Configs that a layer's others have to beat: those in use, or without a GPU the rule's."""
        return {pass_: self.in_use(pass_, layer) if self.clock_of else self.default(pass_) for pass_ in IN_TURN}

    def in_use(self, pass_: Pass, layer: Layer | None = None) -> Config:
        """Config that a layer gets now, or a layer that nobody tuned."""
        own = {"closed": self.closed} if layer is None else {"geometry": layer.geometry, "maps": layer.maps}
        target = self.model.target
        return choose_config(pass_, self.dim, self.bits, target.name, target.device, **own, biased=self.biased)

    def default(self, pass_: Pass) -> Config:
        return self.in_use(pass_) if self.clock_of else rule(pass_, self.dim, self.bits, self.biased)

    def known(self, pass_: Pass, layer: Layer) -> list[Config]:
        """Configs that are raced in any case."""
        return [self.start(layer)[pass_], self.in_use(pass_, layer), self.in_use(pass_), self.default(pass_)]

    def applies(self, pass_: Pass, layer: Layer) -> bool:
        """Whether the layer has that pass, and for closed tiles, whether it could."""
        start = self.start(layer)
        if pass_ is not Pass.CLOSED_BACKWARD:
            return bool(self.model.steps(layer, pass_, start))
        configs = [start[pass_], *self.own[pass_, layer][:1]]
        each = [self.model.steps(layer, pass_, start | {pass_: config}) for config in configs]
        return any(step.pass_ is pass_ for steps in each for step in steps)

    def _in_order_of_promise(self) -> list[tuple[Pass, Layer, Config]]:
        """First what is in use, then every list's best, then every list's second: the budget may end any time."""
        lists = []
        for pass_, layer in product(IN_TURN, self.layers):
            if self.applies(pass_, layer):
                lists.append([(pass_, layer, config) for config in self.known(pass_, layer) + self.own[pass_, layer]])
                lists.append([(pass_, layer, config) for config in self.shared[pass_]])
        ordered = (wanted for each in zip_longest(*lists) for wanted in each if wanted is not None)
        return list(dict.fromkeys(ordered))

    def _compile(self, promise: Sequence[tuple[Pass, Layer, Config]]) -> None:
        budget = self.budget.share(COMPILING[self.clock_of is not None])
        for pass_, layer, config in tqdm(promise, "configs compiled and inspected", disable=None):
            if budget.is_spent:
                break
            self.model.want(layer, pass_, self.start(layer) | {pass_: config}, budget)
            self.wanted.add((pass_, layer, config))
        self.model.finish(budget)

    def _shared_shortlist(self, pass_: Pass) -> list[Config]:
        """Configs that promise most for all layers together."""
        layers = [layer for layer in self.layers if self.applies(pass_, layer)]
        totals: dict[Config, float | Rejection] = {}
        for config in self.shared[pass_] if layers else []:
            if not all((pass_, layer, config) in self.wanted for layer in layers):
                continue
            each = {layer: self.model.predict(layer, pass_, self.start(layer) | {pass_: config}) for layer in layers}
            why = next((seconds for seconds in each.values() if isinstance(seconds, Rejection)), None)
            totals[config] = why or sum(x.count * t for x, t in each.items() if not isinstance(t, Rejection))
        return shortlist(totals, GENERAL if self.clock_of else len(totals))

    # One layer

    def _tune(self, layer: Layer, shared: Mapping[Pass, list[Config]], budget: Budget) -> list[str]:
        """Races the configs of every pass; the next pass runs with the winner. Returns what was found to be wrong."""
        chosen, wrong = self.start(layer), []
        clock = self.clock_of(layer) if self.clock_of else None
        passes = [pass_ for pass_ in IN_TURN if self.applies(pass_, layer)]
        for pass_, share in shared_out(budget, passes):

            def configs(config: Config, pass_: Pass = pass_) -> Configs:
                return chosen | {pass_: config}

            def predict(config: Config, pass_: Pass = pass_) -> float | Rejection:
                return self.model.predict(layer, pass_, configs(config))

            seen = [config for config in self.own[pass_, layer] if (pass_, layer, config) in self.wanted]
            fixed = [*self.known(pass_, layer), *shared[pass_]]
            if clock is None:
                finished = race(dict.fromkeys([*fixed, *seen]), predict, share, rounds=1)
            else:
                most = min(max(int(share.left / RACE_SECONDS), FEWEST), MOST)
                promising = shortlist({config: predict(config) for config in seen}, most)
                variants = [replace(promising[0], **change) for change in UNMODELLED] if promising else []
                variants += [self.model.tightened(layer, pass_, configs(config)) for config in promising[:1]]
                choices = [configs(config) for config in dict.fromkeys([*fixed, *promising, *variants])]
                finished = self._race_distinct(layer, pass_, choices, clock, share)
                wrong += [f"{layer} {pass_} {config}: {why}" for config, why in finished.rejected.items()]
            self.races[pass_][layer] = finished
            chosen[pass_] = finished.winner(chosen[pass_], self.rounds)
        return wrong

    def _race_distinct(
        self, layer: Layer, pass_: Pass, choices: Iterable[Configs], clock: Clock, budget: Budget
    ) -> Race[Config]:
        """Times configs; those that come to the same launches run once."""
        alike: dict[tuple, list[Config]] = {}
        of: dict[Config, Configs] = {}
        for configs in choices:
            steps = self.model.steps(layer, pass_, configs)
            key = tuple((step.variant, step.schedule.grid, step.schedule.batch_step) for step in steps)
            alike.setdefault(key, []).append(configs[pass_])
            of[configs[pass_]] = configs
        firsts = [first for first, *_ in alike.values()]
        finished = race(firsts, lambda config: clock(pass_, of[config]), budget, ROUNDS)
        for first, *others in alike.values():
            finished.seconds |= dict.fromkeys(others, finished.seconds[first])
        return finished

    # All layers

    def _decide(self, pass_: Pass, found: Found) -> None:
        """The config for layers in general, and those that single layers get because it is not good enough for them."""
        races, key = self.races[pass_], table_key(pass_, self.dim, self.bits, self.biased)
        layers = [layer for layer in self.layers if self.applies(pass_, layer)]
        general = None
        if self.general and layers and all(layer in races for layer in layers):
            together = combined(races)
            winner = together.winner(self.default(pass_), self.rounds)
            if winner in together.seconds:
                general = winner
                found.entries[table_key(pass_, self.dim, self.bits, self.biased, self.closed)] = asdict(general)
        for layer, finished in races.items():
            now = self.in_use(pass_, layer)
            default = now if general is None else general
            config = finished.winner(default, self.rounds)
            own = config != default
            if own or general is not None:
                own_key = f"{key}/{store.geometry_key(layer.geometry)}/{layer.maps}"
                found.entries[own_key] = asdict(config) if own else None
            if not self.clock_of and finished.rejected.get(now, NOT_COMPILED.reason) != NOT_COMPILED.reason:
                found.wrong.append(f"{layer} {pass_} {now}, which is in use: {finished.rejected[now]}")
            if finished.seconds.get(config):
                before = finished.median(now) if finished.seconds.get(now) else inf
                found.rows.append(Row(layer, pass_, before, finished.median(config), config, own))


def tune_kernels(
    layers: Sequence[Layer],
    dtype: torch.dtype,
    target: Target,
    budget: Budget,
    device: torch.device | None = None,
    *,
    general: bool,
    jobs: int,
) -> tuple[Found, tuple[int, int]]:
    """Finds configs for the GPU that is here, or for one that is not: then nothing runs, and no result is checked."""

    def clock_of(layer: Layer) -> Clock:
        assert device is not None
        run = LayerRun(layer, dtype, device, attention, lambda configs: {"preset": Preset(configs=configs)})
        return lambda pass_, configs: run.score(in_order(configs), backward=pass_.is_backward)

    # A table that ships for several GPUs has to fit them all.
    alike = [] if device else [each.shared for name, each in TARGETS.items() if LIKE.get(name) == target.name]
    with compilers(target, jobs) as submit:
        model = Model(target, dtype, submit, min([target.shared, *alike]))
        return KernelSearch(layers, model, budget, clock_of if device else None, general).run()


def shipped(entries: Mapping[str, Config]) -> dict[str, dict[str, int]]:
    """Entries as they go into `kernels/tuned/`: without those that only say what the rule says anyway."""

    def is_rule(key: str, config: Config) -> bool:
        name, dim, bits, *of = key.split("/")
        return of in ([], ["unbiased"]) and config == rule(Pass(name), int(dim), int(bits), biased=not of)

    return {key: asdict(config) for key, config in entries.items() if not is_rule(key, config)}
