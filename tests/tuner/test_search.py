"""The choice among candidates: what is slow or wrong loses, noise wins nothing, and the budget is kept."""

import itertools
import math
import random

import pytest

from dinat_triton.layers import Layer
from dinat_triton.tuner.search import (
    Budget,
    Found,
    Race,
    Rejection,
    combined,
    layer_by_layer,
    merged,
    race,
    shared_out,
    shortlist,
)

FOREVER = 1e6


class Time:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def layer(size: int, heads: int = 2, batch: int = 1, count: int = 1) -> Layer:
    return Layer(f"{size}x{size}-d1", (size, size), heads, (1, 1), count, batch=batch)


# Races


def test_a_planted_slow_choice_loses() -> None:
    seconds = {"default": 1.0, "fast": 0.5, "slow": 20.0}
    finished = race(list(seconds), seconds.__getitem__, Budget(FOREVER))
    assert finished.ranked == ["fast", "default", "slow"]
    assert finished.winner("default") == "fast"
    assert finished.winner("slow") == "fast"
    assert finished.winner("fast") == "fast"


def test_a_rejected_choice_loses_however_fast() -> None:
    def score(choice: str) -> float | Rejection:
        return Rejection("wrong") if choice == "wrong" else {"default": 1.0, "next": 0.9}[choice]

    finished = race(["default", "wrong", "next"], score, Budget(FOREVER))
    assert finished.rejected == {"wrong": "wrong"}
    assert finished.winner("default") == "next"


def test_what_turns_out_wrong_later_loses_its_times() -> None:
    calls = itertools.count()

    def score(choice: str) -> float | Rejection:
        return (
            Rejection("wrong at last")
            if choice == "fast" and next(calls) == 4
            else {"default": 1.0, "fast": 0.1}[choice]
        )

    finished = race(["default", "fast"], score, Budget(FOREVER))
    assert finished.winner("default") == "default"
    assert len(finished.seconds["default"]) == 5


def test_choices_take_turns() -> None:
    order: list[str] = []
    race("abc", lambda choice: order.append(choice) or 1.0, Budget(FOREVER), rounds=3)
    assert order == list("abcabcabc")


def test_noise_wins_nothing() -> None:
    rng = random.Random(0)
    wins = 0
    for _ in range(200):
        finished = race(range(6), lambda _: 1 + 0.03 * rng.random(), Budget(FOREVER))
        wins += finished.winner(0) != 0
    assert wins <= 2


def test_a_busy_moment_decides_nothing() -> None:
    busy = iter([1.0, 0.9] * 2 + [9.0, 8.1] + [1.0, 0.9] * 2)
    finished = race(["default", "better"], lambda _: next(busy), Budget(FOREVER))
    assert finished.winner("default") == "better"
    spiked = Race({"default": [1.0, 9.0, 1.0, 1.0, 1.0], "same": [1.0] * 5})
    assert spiked.winner("default") == "default"


def test_a_hair_is_not_worth_an_exception() -> None:
    assert Race({"default": [1.0], "better": [0.985]}).winner("default", 1) == "default"
    assert Race({"default": [1.0], "better": [0.975]}).winner("default", 1) == "better"


def test_a_default_that_cannot_run_gives_way() -> None:
    finished = race(["default", "other"], lambda c: Rejection("spills") if c == "default" else 5.0, Budget(FOREVER))
    assert finished.winner("default") == "other"
    assert race(["default"], lambda _: Rejection("spills"), Budget(FOREVER)).winner("default") == "default"


# Budgets


def test_a_race_ends_with_its_budget() -> None:
    time = Time()

    def score(choice: str) -> float:
        time.now += 1
        return 1.0 if choice == "default" else 0.5

    budget = Budget(6.5, time)
    finished = race(["default", "fast", "unlucky"], score, budget)
    assert time.now == 7
    assert [len(each) for each in finished.seconds.values()] == [3, 2, 2]
    assert finished.winner("default") == "default"  # two times are no proof
    assert finished.winner("default", rounds=2) == "fast"
    assert race(["default"], score, budget).seconds == {"default": []}


def test_shares_of_a_budget() -> None:
    time = Time()
    budget = Budget(10, time)
    time.now = 4
    share = budget.share(1 / 3)
    assert (budget.left, share.left) == (6, 2)
    time.now = 7
    assert (share.is_spent, budget.is_spent) == (True, False)
    time.now = 99
    assert budget.left == 0
    assert budget.share(0.5).left < 1e-6


def test_what_one_search_leaves_the_next_ones_share() -> None:
    time = Time()
    shares = []
    for spent, (_, share) in zip((1, 6, 0), shared_out(Budget(12, time), "abc"), strict=True):
        shares.append(share.left)
        time.now += spent
    assert shares == pytest.approx([4, 5.5, 5])


def test_layers_beyond_the_budget_are_named() -> None:
    time, found = Time(), Found()
    for _ in layer_by_layer([layer(7), layer(14), layer(28)], Budget(10, time), found):
        time.now += 6
    assert found.unreached == [layer(28)]


@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan])
def test_a_budget_is_positive_and_ends(seconds: float) -> None:
    with pytest.raises(ValueError, match="positive number of seconds"):
        Budget(seconds)


# Layers


def test_the_same_layer_is_tuned_once() -> None:
    found = merged([layer(7, count=2), layer(14), layer(7, count=3), layer(7, heads=4), layer(7, batch=2)])
    assert sorted((x.shape[0], x.heads, x.batch, x.count) for x in found) == [
        (7, 2, 1, 5), (7, 2, 2, 1), (7, 4, 1, 1), (14, 2, 1, 1)
    ]  # fmt: skip
    assert found[0].count == 5  # the most expensive first


def test_over_all_layers_the_weighted_sum_counts() -> None:
    races = {
        layer(7, count=10): Race({"default": [1.0], "a": [0.9], "b": [2.0], "only here": [0.1]}),
        layer(14): Race({"default": [1.0], "a": [1.5], "b": [0.1], "rejected": [], "only here": []}),
    }
    together = combined(races)
    assert together.seconds == {"default": [11.0], "a": [10.5], "b": [20.1]}
    assert together.winner("default", 1) == "a"


def test_a_shortlist_leaves_out_what_is_rejected() -> None:
    predicted = {"a": 3.0, "spills": Rejection("spills"), "b": 1.0, "c": 2.0}
    assert shortlist(predicted, 2) == ["b", "c"]
    assert shortlist(predicted, 9) == ["b", "c", "a"]
