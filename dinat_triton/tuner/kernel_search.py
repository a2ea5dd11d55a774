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
IN_TURN = ("forward", "query_backward", "key_backward", "closed_backward")
# What the model cannot tell apart is left to the clock.
UNMODELLED: tuple[dict[str, int], ...] = ({"programs": 4}, {"programs": 16}, {"programs": 32}, {"programs": 64})
# Configs of a layer's pass that are timed, as the budget allows, and seconds that each takes in all its rounds.
FEWEST, MOST, RACE_SECONDS = 4, 32, 0.3
# Configs that are timed on all layers, to find the one for layers that nobody tuned.
GENERAL = 3
# Compiling may take this share of the budget if what it finds is timed afterwards, and this share if not.
COMPILING = {True: 0.5, False: 0.9}

# Seconds of a pass of one layer under configs, or why they must not be taken.
Clock = Callable[[str, Configs], float | Rejection]


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
            (name, layer): candidates(name, [layer], self.bits, warp) for name, layer in product(IN_TURN, self.layers)
        }
        self.shared = {name: candidates(name, self.layers, self.bits, warp) if self.general else [] for name in IN_TURN}
        self.wanted: set[tuple[str, Layer, Config]] = set()
        self.races: dict[str, dict[Layer, Race[Config]]] = {name: {} for name in IN_TURN}

    def run(self) -> tuple[Found, tuple[int, int]]:
        """The results, and how many configs of layers the budget allowed to look at, of how many."""
        found = Found()
        promise = self._in_order_of_promise()
        self._compile(promise)
        shared = {name: self._shared_shortlist(name) for name in IN_TURN}
        for layer, share in layer_by_layer(self.layers, self.budget, found):
            found.wrong += self._tune(layer, shared, share)
        for name in IN_TURN:
            self._decide(name, found)
        return found, (len(self.wanted), len(promise))

    # What there is to choose from

    def start(self, layer: Layer) -> Configs:
        """Configs that a layer's others have to beat: those in use, or without a GPU the rule's."""
        return {name: self.in_use(name, layer) if self.clock_of else self.default(name) for name in IN_TURN}

    def in_use(self, name: str, layer: Layer | None = None) -> Config:
        """Config that a layer gets now, or a layer that nobody tuned."""
        own = {"closed": self.closed} if layer is None else {"geometry": layer.geometry, "maps": layer.maps}
        target = self.model.target
        return choose_config(name, self.dim, self.bits, target.name, target.device, **own, biased=self.biased)

    def default(self, name: str) -> Config:
        return self.in_use(name) if self.clock_of else rule(name, self.dim, self.bits, self.biased)

    def known(self, name: str, layer: Layer) -> list[Config]:
        """Configs that are raced in any case."""
        return [self.start(layer)[name], self.in_use(name, layer), self.in_use(name), self.default(name)]

    def applies(self, name: str, layer: Layer) -> bool:
        """Whether the layer has that pass, and for closed tiles, whether it could."""
        start = self.start(layer)
        if name != "closed_backward":
            return bool(self.model.steps(layer, name, start))
        configs = [start[name], *self.own[name, layer][:1]]
        each = [self.model.steps(layer, name, start | {name: config}) for config in configs]
        return any(step.name == name for steps in each for step in steps)

    def _in_order_of_promise(self) -> list[tuple[str, Layer, Config]]:
        """First what is in use, then every list's best, then every list's second: the budget may end any time."""
        lists = []
        for name, layer in product(IN_TURN, self.layers):
            if self.applies(name, layer):
                lists.append([(name, layer, config) for config in self.known(name, layer) + self.own[name, layer]])
                lists.append([(name, layer, config) for config in self.shared[name]])
        ordered = (wanted for each in zip_longest(*lists) for wanted in each if wanted is not None)
        return list(dict.fromkeys(ordered))

    def _compile(self, promise: Sequence[tuple[str, Layer, Config]]) -> None:
        budget = self.budget.share(COMPILING[self.clock_of is not None])
        for name, layer, config in tqdm(promise, "configs compiled and inspected", disable=None):
            if budget.is_spent:
                break
            self.model.want(layer, name, self.start(layer) | {name: config}, budget)
            self.wanted.add((name, layer, config))
        self.model.finish(budget)

    def _shared_shortlist(self, name: str) -> list[Config]:
        """Configs that promise most for all layers together."""
        layers = [layer for layer in self.layers if self.applies(name, layer)]
        totals: dict[Config, float | Rejection] = {}
        for config in self.shared[name] if layers else []:
            if not all((name, layer, config) in self.wanted for layer in layers):
                continue
            each = {layer: self.model.predict(layer, name, self.start(layer) | {name: config}) for layer in layers}
            why = next((seconds for seconds in each.values() if isinstance(seconds, Rejection)), None)
            totals[config] = why or sum(x.count * t for x, t in each.items() if not isinstance(t, Rejection))
        return shortlist(totals, GENERAL if self.clock_of else len(totals))

    # One layer

    def _tune(self, layer: Layer, shared: Mapping[str, list[Config]], budget: Budget) -> list[str]:
        """Races the configs of every pass; the next pass runs with the winner. Returns what was found to be wrong."""
        chosen, wrong = self.start(layer), []
        clock = self.clock_of(layer) if self.clock_of else None
        passes = [name for name in IN_TURN if self.applies(name, layer)]
        for name, share in shared_out(budget, passes):

            def configs(config: Config, name: str = name) -> Configs:
                return chosen | {name: config}

            def predict(config: Config, name: str = name) -> float | Rejection:
                return self.model.predict(layer, name, configs(config))

            seen = [config for config in self.own[name, layer] if (name, layer, config) in self.wanted]
            fixed = [*self.known(name, layer), *shared[name]]
            if clock is None:
                finished = race(dict.fromkeys([*fixed, *seen]), predict, share, rounds=1)
            else:
                most = min(max(int(share.left / RACE_SECONDS), FEWEST), MOST)
                promising = shortlist({config: predict(config) for config in seen}, most)
                variants = [replace(promising[0], **change) for change in UNMODELLED] if promising else []
                variants += [self.model.tightened(layer, name, configs(config)) for config in promising[:1]]
                choices = [configs(config) for config in dict.fromkeys([*fixed, *promising, *variants])]
                finished = self._race_distinct(layer, name, choices, clock, share)
                wrong += [f"{layer} {name} {config}: {why}" for config, why in finished.rejected.items()]
            self.races[name][layer] = finished
            chosen[name] = finished.winner(chosen[name], self.rounds)
        return wrong

    def _race_distinct(
        self, layer: Layer, name: str, choices: Iterable[Configs], clock: Clock, budget: Budget
    ) -> Race[Config]:
        """Times configs; those that come to the same launches run once."""
        alike: dict[tuple, list[Config]] = {}
        of: dict[Config, Configs] = {}
        for configs in choices:
            steps = self.model.steps(layer, name, configs)
            key = tuple((step.variant, step.schedule.grid, step.schedule.batch_step) for step in steps)
            alike.setdefault(key, []).append(configs[name])
            of[configs[name]] = configs
        firsts = [first for first, *_ in alike.values()]
        finished = race(firsts, lambda config: clock(name, of[config]), budget, ROUNDS)
        for first, *others in alike.values():
            finished.seconds |= dict.fromkeys(others, finished.seconds[first])
        return finished

    # All layers

    def _decide(self, name: str, found: Found) -> None:
        """The config for layers in general, and those that single layers get because it is not good enough for them."""
        races, key = self.races[name], table_key(name, self.dim, self.bits, self.biased)
        layers = [layer for layer in self.layers if self.applies(name, layer)]
        general = None
        if self.general and layers and all(layer in races for layer in layers):
            together = combined(races)
            winner = together.winner(self.default(name), self.rounds)
            if winner in together.seconds:
                general = winner
                found.entries[table_key(name, self.dim, self.bits, self.biased, self.closed)] = asdict(general)
        for layer, finished in races.items():
            now = self.in_use(name, layer)
            default = now if general is None else general
            config = finished.winner(default, self.rounds)
            own = config != default
            if own or general is not None:
                own_key = f"{key}/{store.geometry_key(layer.geometry)}/{layer.maps}"
                found.entries[own_key] = asdict(config) if own else None
            if not self.clock_of and finished.rejected.get(now, NOT_COMPILED.reason) != NOT_COMPILED.reason:
                found.wrong.append(f"{layer} {name} {now}, which is in use: {finished.rejected[now]}")
            if finished.seconds.get(config):
                before = finished.median(now) if finished.seconds.get(now) else inf
                found.rows.append(Row(layer, name, before, finished.median(config), config, own))


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
        return lambda name, configs: run.score(in_order(configs), backward=name != "forward")

    # A table that ships for several GPUs has to fit them all.
    alike = [] if device else [TARGETS[name].shared for name, like in LIKE.items() if like == target.name]
    with compilers(target, jobs) as submit:
        model = Model(target, dtype, submit, min([target.shared, *alike]))
        return KernelSearch(layers, model, budget, clock_of if device else None, general).run()


def shipped(entries: Mapping[str, Config]) -> dict[str, dict[str, int]]:
    """Entries as they go into `kernels/tuned/`: without those that only say what the rule says anyway."""

    def is_rule(key: str, config: Config) -> bool:
        name, dim, bits, *of = key.split("/")
        return of in ([], ["unbiased"]) and config == rule(name, int(dim), int(bits), biased=not of)

    return {key: asdict(config) for key, config in entries.items() if not is_rule(key, config)}
