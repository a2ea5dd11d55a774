"""The choice among candidates: what is slow or wrong loses, noise wins nothing, and the budget is kept."""

import random

from dinat_triton.tuner.search import Budget, Race, Rejection, race

FOREVER = 1e6


def test_the_fastest_choice_wins_unless_it_is_rejected_sooner_or_later() -> None:
    seconds = {"default": 1.0, "fast": 0.5, "slow": 20.0, "wrong": 0.1, "wrong at last": 0.1}
    order: list[str] = []

    def score(choice: str) -> float | Rejection:
        order.append(choice)
        late = choice == "wrong at last" and order.count(choice) == 3
        return Rejection("no") if choice == "wrong" or late else seconds[choice]

    finished = race(list(seconds), score, Budget(FOREVER))
    assert order[:8] == [*seconds, "default", "fast", "slow"]  # they take turns
    assert finished.ranked == ["fast", "default", "slow"]
    assert [finished.winner(default) for default in ("default", "slow", "fast")] == ["fast"] * 3
    assert finished.rejected == {"wrong": "no", "wrong at last": "no"}
    assert finished.winner("wrong") == "fast"
    assert race(["default"], lambda _: Rejection("spills"), Budget(FOREVER)).winner("default") == "default"


def test_noise_wins_nothing() -> None:
    rng = random.Random(0)
    races = (race(range(6), lambda _: 1 + 0.03 * rng.random(), Budget(FOREVER)) for _ in range(200))
    assert sum(finished.winner(0) != 0 for finished in races) <= 2


def test_a_busy_moment_decides_nothing_and_a_hair_is_not_worth_an_exception() -> None:
    busy = {"default": [1.0, 1.0, 9.0, 1.0, 1.0], "better": [0.9, 0.9, 8.1, 0.9, 0.9]}
    assert Race(busy).winner("default") == "better"
    assert Race({"default": busy["default"], "same": [1.0] * 5}).winner("default") == "default"
    assert Race({"default": [1.0], "better": [0.985]}).winner("default", 1) == "default"
    assert Race({"default": [1.0], "better": [0.975]}).winner("default", 1) == "better"


def test_a_race_ends_with_its_budget() -> None:
    scored: list[str] = []  # one a second

    def score(choice: str) -> float:
        scored.append(choice)
        return 1.0 if choice == "default" else 0.5

    budget = Budget(6.5, lambda: float(len(scored)))
    finished = race(["default", "fast", "unlucky"], score, budget)
    assert len(scored) == 7
    assert [len(each) for each in finished.seconds.values()] == [3, 2, 2]
    assert finished.winner("default") == "default"  # two times are no proof
    assert finished.winner("default", rounds=2) == "fast"
    assert race(["default"], score, budget).seconds == {"default": []}
