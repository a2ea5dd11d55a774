"""Which of some choices is fastest: the part of tuning that is the same for all devices, measured and modelled.

What a choice takes is up to a `score`, in seconds, or a Rejection that says why it must not be taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Generic, TypeVar

from dinat_triton.layers import Layer

# What gains less than this is not worth an exception.
LEAST_GAIN = 1.02
# Times that a choice is timed, and how many of them it takes to trust it: a single one may be luck.
ROUNDS, LEAST_ROUNDS = 5, 3

Choice = TypeVar("Choice", bound=Hashable)


@dataclass(frozen=True)
class Rejection:
    """Why a choice must not be taken."""

    reason: str


Score = Callable[[Choice], float | Rejection]


@dataclass(frozen=True)
class Work:
    """A layer as it is tuned. `weight` is how often the models have it."""

    layer: Layer
    batch: int
    weight: int = 1

    @property
    def maps(self) -> int:
        return self.batch * self.layer.heads

    @property
    def label(self) -> str:
        return f"{self.layer.name} h{self.layer.heads} b{self.batch}"


def merged(works: Iterable[Work]) -> list[Work]:
    """Each layer once, with the weights of its copies, the most expensive first."""
    found: dict[tuple, Work] = {}
    for work in works:
        layer = work.layer
        key = (layer.geometry, layer.heads, layer.dim, work.batch)
        weight = work.weight + (found[key].weight if key in found else 0)
        found[key] = Work(layer, work.batch, weight)
    return sorted(found.values(), key=lambda work: -work.weight * work.maps * work.layer.geometry.num_pairs)


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


@dataclass
class Race(Generic[Choice]):
    """What each choice took, round by round, and which ones were rejected."""

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
        """How many times as long the other took, in at least four rounds out of five."""
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


def race(choices: Sequence[Choice], score: Score[Choice], budget: Budget, rounds: int = ROUNDS) -> Race[Choice]:
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


def combined(races: Mapping[Work, Race[Choice]]) -> Race[Choice]:
    """The race over all works together: of each choice that ran in all of them, the weighted times of each round."""
    each = list(races.values())
    everywhere = [c for c in each[0].seconds if all(r.seconds.get(c) for r in each)] if each else []
    totals = {
        choice: [
            sum(work.weight * t for work, t in zip(races, times, strict=True))
            for times in zip(*(r.seconds[choice] for r in each), strict=False)
        ]
        for choice in everywhere
    }
    return Race(totals)


def shortlist(predicted: Mapping[Choice, float | Rejection], most: int) -> list[Choice]:
    """The choices that promise most, those rejected left out."""
    sound = {choice: seconds for choice, seconds in predicted.items() if not isinstance(seconds, Rejection)}
    return sorted(sound, key=lambda choice: sound[choice])[:most]
