"""Search for the fastest of some choices: the part of tuning that is the same for all devices, measured and modelled.

A `score` says what a choice takes, in seconds, or is a Rejection that says why it must not be taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from dinat_triton.layers import Layer

# What gains less than this is not worth an exception.
LEAST_GAIN = 1.02
# Times that a choice is timed, and how many of them it takes to trust it: a single one may be luck.
ROUNDS, LEAST_ROUNDS = 5, 3

Choice = TypeVar("Choice", bound=Hashable)


@dataclass(frozen=True)
class Rejection:
    """Reason why a choice must not be taken."""

    reason: str


Score = Callable[[Choice], float | Rejection]


def merged(layers: Iterable[Layer]) -> list[Layer]:
    """Each layer once, with the counts of its copies, the most expensive first."""
    found: dict[Layer, Layer] = {}
    for layer in layers:
        key = replace(layer, name="", count=0)
        first = found.get(key)
        found[key] = layer if first is None else replace(first, count=first.count + layer.count)
    return sorted(found.values(), key=lambda layer: -layer.count * layer.maps * layer.geometry.num_pairs)


class Budget:
    """Seconds that may be spent from now on."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        if not 0 < seconds < math.inf:
            raise ValueError(f"the budget must be a positive number of seconds, got {seconds}")
        self.clock, self.end = clock, clock() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self.end - self.clock())

    @property
    def is_spent(self) -> bool:
        return self.left == 0

    def share(self, fraction: float) -> Budget:
        """A part of what is left."""
        return Budget(max(fraction * self.left, 1e-9), self.clock)


T = TypeVar("T")


def shared_out(budget: Budget, things: Sequence[T]) -> Iterator[tuple[T, Budget]]:
    """Each thing with its share of what is left: what one does not spend goes to those behind it."""
    for number, thing in enumerate(things):
        yield thing, budget.share(1 / (len(things) - number))


@dataclass(frozen=True)
class Row:
    """The result for a pass of a layer. Seconds are measured, or the model's; infinite if rejected before."""

    layer: Layer
    name: str
    before: float
    after: float
    choice: Any
    changed: bool


@dataclass
class Found:
    """The results of a search.

    Attributes:
        entries: For the table, by key; None where a key needs none any more.
        rows: Times before and after.
        wrong: Choices rejected although they promised well, and why.
        unreached: Layers that the budget did not allow to tune.
    """

    entries: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unreached: list[Layer] = field(default_factory=list)


def layer_by_layer(layers: Sequence[Layer], budget: Budget, found: Found) -> Iterator[tuple[Layer, Budget]]:
    """Layers with their shares of the budget, as long as it lasts; the others are noted as not reached."""
    for layer, share in tqdm(shared_out(budget, layers), "layers", len(layers), disable=None):
        if budget.is_spent:
            found.unreached.append(layer)
        else:
            yield layer, share


@dataclass
class Race(Generic[Choice]):
    """Seconds of each choice, round by round, and the choices that were rejected."""

    seconds: dict[Choice, list[float]] = field(default_factory=dict)
    rejected: dict[Choice, str] = field(default_factory=dict)

    @property
    def ranked(self) -> list[Choice]:
        """Choices that were scored, the fastest first."""
        scored = [choice for choice, seconds in self.seconds.items() if seconds]
        return sorted(scored, key=self.median)

    def median(self, choice: Choice) -> float:
        return median(self.seconds[choice])

    def gain(self, choice: Choice, over: Choice) -> float:
        """Factor by which the other is slower, in at least four rounds out of five."""
        if not self.seconds.get(over):
            return math.inf
        ratios = sorted(b / a for a, b in zip(self.seconds[choice], self.seconds[over], strict=False))
        return ratios[round(0.2 * (len(ratios) - 1))] if ratios else 0.0

    def winner(self, default: Choice, rounds: int = LEAST_ROUNDS) -> Choice:
        """The fastest choice that beats the default by more than noise, or else the default.

        Args:
            default: What is taken as long as nothing is better.
            rounds: Times that a choice must have been scored to be trusted.
        """
        for choice in self.ranked:
            if choice == default:
                break
            if len(self.seconds[choice]) >= rounds and self.gain(choice, default) >= LEAST_GAIN:
                return choice
        return default


def race(choices: Iterable[Choice], score: Score[Choice], budget: Budget, rounds: int = ROUNDS) -> Race[Choice]:
    """Scores choices in turns, so that a busy moment of the machine meets them all, as long as the budget lasts."""
    found: Race[Choice] = Race({choice: [] for choice in choices})
    for _ in range(rounds):
        for choice in found.seconds:
            if choice in found.rejected:
                continue
            if budget.is_spent:
                return found
            result = score(choice)
            if isinstance(result, Rejection):
                found.rejected[choice] = result.reason
                found.seconds[choice] = []
            else:
                found.seconds[choice].append(result)
    return found


def combined(races: Mapping[Layer, Race[Choice]]) -> Race[Choice]:
    """The race over all layers together: of each choice that ran in all of them, the sums of each round."""
    each = list(races.values())
    everywhere = [c for c in each[0].seconds if all(r.seconds.get(c) for r in each)] if each else []
    totals = {
        choice: [
            sum(layer.count * t for layer, t in zip(races, times, strict=True))
            for times in zip(*(r.seconds[choice] for r in each), strict=False)
        ]
        for choice in everywhere
    }
    return Race(totals)


def shortlist(predicted: Mapping[Choice, float | Rejection], most: int) -> list[Choice]:
    """The choices that promise most, those rejected left out."""
    sound = {choice: seconds for choice, seconds in predicted.items() if not isinstance(seconds, Rejection)}
    return sorted(sound, key=lambda choice: sound[choice])[:most]
