"""Tuning the kernels: what is pruned, what is trusted, and what ends up in the tables."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from dinat_triton import store
from dinat_triton.kernels import configs
from dinat_triton.kernels.configs import Config, choose_plan, plan_cost
from dinat_triton.layers import Layer
from dinat_triton.offline.inspect import KernelVariant, Report
from dinat_triton.offline.targets import TARGETS
from dinat_triton.tuner import kernel_search, model
from dinat_triton.tuner.kernel_search import IN_TURN, KernelSearch
from dinat_triton.tuner.model import Model, Submit, candidates
from dinat_triton.tuner.search import Budget, Found, Rejection

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the kernels are interpreted")

TARGET = TARGETS["sm_90"]
DENSE = Layer("7x7-d1", (7, 7), 2, (1, 1), batch=2)
SLIDING = Layer("14x14-d1", (14, 14), 2, (1, 1), 3, batch=2)


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_tuned: Callable[[], None]) -> None:
    """Few configs, no tables but the rule."""
    monkeypatch.setattr(configs, "TABLES", tmp_path / "none")
    monkeypatch.setenv(store.ENVIRONMENT, str(tmp_path / "cache"))
    monkeypatch.setattr(model, "CHUNKS", (32, 64))
    monkeypatch.setattr(model, "ONE_CHUNKS", (64,))


def compiler(judge: Callable[[KernelVariant], dict[str, object]] = lambda variant: {}) -> Submit:
    """Answers at once what `judge` says of a variant, without compiling it."""

    def submit(variant: KernelVariant) -> Future:
        fields = {
            "variant": variant, "target": TARGET.name, "registers": 64, "spills": 0, "shared": 1024, "matrix": {},
            "exps": 16, "expected_exps": 16.0, "loads": {16: 1}, "chunk_length": 100, "item_length": 100,
            "programs": 8,
        }  # fmt: skip
        future: Future = Future()
        future.set_result(Report(**(fields | judge(variant))))
        return future

    return submit


def search(layers: list[Layer], clock_of: Any = None, submit: Submit | None = None, **options) -> Found:
    ranked = Model(TARGET, torch.bfloat16, submit or compiler())
    return KernelSearch(layers, ranked, Budget(1e6), clock_of, **options).run()[0]


@pytest.mark.parametrize("name", IN_TURN)
def test_plans_that_cost_too_much_are_no_candidates(name: str) -> None:
    found = candidates(name, [SLIDING], 16, 32)
    costs = [plan_cost(choose_plan(SLIDING.geometry, c, 64, name == "key_backward"), 64) for c in found]
    assert costs == sorted(costs)
    assert costs[-1] <= model.MOST_COST * costs[0]
    assert len(found) == len(set(found)) > 8
    assert 16 not in {config.rows for config in candidates(name, [DENSE], 16, 32)}


def test_no_dropped_config_is_run_and_the_best_with_fewer_registers_too() -> None:
    ran: set[Config] = set()
    seconds = lambda name, chosen: ran.add(chosen[name]) or 1.0  # noqa: E731
    spilling = compiler(lambda variant: {"complaints": ["spills"] * (variant.options["num_warps"] == 2)})
    search([SLIDING], lambda layer: seconds, spilling)
    assert {config.warps for config in ran} == {1, 4, 8}
    assert min(config.registers for config in ran) < max(config.registers for config in ran) == 255
    found = search([DENSE, SLIDING], submit=compiler(lambda variant: {"complaints": ["spills"]}))
    assert (found.entries, found.rows) == ({}, [])


def test_planted_slow_and_wrong_configs_lose() -> None:
    """The estimate cannot tell stages apart here, so only the planted times decide."""

    def seconds(name: str, chosen: dict[str, Config]) -> float | Rejection:
        stages = chosen[name].stages
        return Rejection("wrong out (error 3.0e-01)") if stages == 3 else 1.0 if stages == 5 else 5.0

    found = search([SLIDING], lambda layer: seconds)
    rows = {row.name: row for row in found.rows}
    assert set(rows) == {"forward", "query_backward", "key_backward"}
    assert all((row.before, row.after, row.choice.stages) == (5.0, 1.0, 5) for row in rows.values())
    assert any("14x14-d1 h2 b2 forward Config(" in each and "wrong out" in each for each in found.wrong)
    assert all(entry["stages"] == 5 for entry in found.entries.values() if entry)


def test_a_layer_gets_its_own_config_only_if_the_general_one_is_worse_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_search, "GENERAL", 99)
    best = {DENSE: 64, SLIDING: 32}
    clock_of = lambda layer: lambda name, chosen: 1.0 if chosen[name].rows == best[layer] else 2.0  # noqa: E731
    found = search([SLIDING, DENSE], clock_of)
    assert found.entries["forward/32/16"]["rows"] == 32  # three sliding layers to one dense
    assert found.entries["forward/32/16/14x14-k7x7-d1x1/4"] is None
    assert found.entries["forward/32/16/7x7-k7x7-d1x1/4"]["rows"] == 64
    rows = {(row.layer, row.changed) for row in found.rows if row.name == "forward"}
    assert rows == {(SLIDING, False), (DENSE, True)}
    alone = search([SLIDING], clock_of, general=False)
    assert {key.split("/", 3)[-1] for key in alone.entries} == {"14x14-k7x7-d1x1/4"}


def test_without_a_gpu_the_estimate_decides_for_the_passes_that_a_layer_has() -> None:
    """Planted code that is shorter with two warps must win where nothing is run."""
    judge = compiler(lambda x: {"chunk_length": 10 if x.options["num_warps"] == 2 else 100_000})
    found = search([DENSE, SLIDING], submit=judge)
    assert {(row.layer, row.name) for row in found.rows} == {
        (DENSE, "forward"), (DENSE, "closed_backward"),
        (SLIDING, "forward"), (SLIDING, "query_backward"), (SLIDING, "key_backward"),
    }  # fmt: skip
    assert {row.choice.warps for row in found.rows} == {2}
    assert all(row.after < row.before for row in found.rows)
