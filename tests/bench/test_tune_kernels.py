"""Tuning the kernels: what is pruned, what is trusted, and what ends up in the tables."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import triton

from dinat_triton import store
from dinat_triton.commands.tune import Part, kernel_report
from dinat_triton.kernels import configs, schedule
from dinat_triton.kernels.configs import Architecture, Config, plan_cost, rule
from dinat_triton.layers import Layer
from dinat_triton.offline.inspect import Launch, Report
from dinat_triton.offline.targets import TARGETS
from dinat_triton.tuner import configs as tune_kernels
from dinat_triton.tuner.configs import Configs, Found, Model, Search, candidates, target_of
from dinat_triton.tuner.search import Budget, Rejection, Work

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the kernels are interpreted")

TARGET = TARGETS["sm_90"]
DENSE = Work(Layer("7x7-d1", (7, 7), 2, (1, 1)), 2)
SLIDING = Work(Layer("14x14-d1", (14, 14), 2, (1, 1)), 2, weight=3)


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few configs, no tables but the rule."""
    monkeypatch.setattr(configs, "TABLES", tmp_path / "none")
    monkeypatch.setenv(store.ENVIRONMENT, str(tmp_path / "cache"))
    monkeypatch.setattr(tune_kernels, "CHUNKS", (32, 64))
    monkeypatch.setattr(tune_kernels, "ONE_CHUNKS", (64,))
    configs.forget_tables()
    yield
    configs.forget_tables()


def report_of(launch: Launch, **changed: object) -> Report:
    fields = {
        "launch": launch, "target": TARGET.name, "registers": 64, "spills": 0, "shared": 1024, "matrix": {}, "exps": 16,
        "expected_exps": 16.0, "loads": {16: 1}, "chunk_length": 100, "item_length": 100, "chunk_exchange": 0,
        "item_exchange": 0, "programs": 8,
    }  # fmt: skip
    return Report(**(fields | changed))


def compiler(judge: Callable[[Launch], dict[str, object]] = lambda launch: {}) -> Callable[[Launch], Future]:
    """Answers at once what `judge` says of a launch, without compiling it."""

    def submit(launch: Launch) -> Future:
        future: Future = Future()
        future.set_result(report_of(launch, **judge(launch)))
        return future

    return submit


class PlantedClock:
    """Times are what the test says."""

    def __init__(self, seconds: Callable[[str, Config], float | Rejection]):
        self.seconds = seconds

    def score(self, name: str, configs: Configs) -> float | Rejection:
        return self.seconds(name, configs[name])


def search(
    works: list[Work], seconds: Callable[[str, Config], float | Rejection] | None = None, budget: float = 1e6, **options
) -> Found:
    model = Model(TARGET, torch.bfloat16, options.pop("submit", compiler()))
    clock_of = None if seconds is None else lambda work: PlantedClock(seconds)
    return Search(works, model, Budget(budget), "", clock_of, bar=None, **options).run()


# What is pruned


@pytest.mark.parametrize("name", tune_kernels.PASSES)
def test_plans_that_cost_too_much_are_no_candidates(name: str) -> None:
    geometry = SLIDING.layer.geometry
    found = candidates(name, [SLIDING], 16, 32)
    costs = [plan_cost(configs.choose_plan(geometry, c, 64, name == "key_backward"), 64) for c in found]
    assert costs == sorted(costs)
    assert costs[-1] <= tune_kernels.MOST_COST * costs[0]
    assert len(found) == len(set(found)) > 8
    assert 16 not in {config.rows for config in candidates(name, [DENSE], 16, 32)}


def test_configs_that_spill_or_need_too_much_shared_memory_are_dropped() -> None:
    def judge(launch: Launch) -> dict[str, object]:
        return {1: {"complaints": ["spills 8 bytes"]}, 2: {"shared": 200_000}, 3: {}}[launch.options["num_stages"]]

    model = Model(TARGET, torch.bfloat16, compiler(judge), shared=100_000)
    start = {name: rule(name, 32, 16) for name in tune_kernels.PASSES}
    found = {}
    for stages in (1, 2, 3):
        configs = start | {"forward": Config(stages=stages)}
        model.want(SLIDING, "forward", configs, Budget(9))
        found[stages] = model.predict(SLIDING, "forward", configs)
    assert found[1] == Rejection("spills 8 bytes")
    assert found[2] == Rejection("needs 200000 bytes of shared memory, 100000 may be used")
    assert isinstance(found[3], float)


def test_where_nothing_is_sound_nothing_is_decided() -> None:
    found = search([DENSE, SLIDING], submit=compiler(lambda launch: {"complaints": ["spills"]}))
    assert found.entries == {}
    assert found.rows == []


def test_no_dropped_config_is_ever_run() -> None:
    ran = set()

    def seconds(name: str, config: Config) -> float:
        ran.add(config.warps)
        return 1.0

    search(
        [SLIDING],
        seconds,
        submit=compiler(lambda launch: {"complaints": ["spills"] * (launch.options["num_warps"] == 2)}),
    )
    assert ran
    assert 2 not in ran


def test_room_for_one_more_program() -> None:
    """Of 65536 registers three programs of 4 warps could have 170 each, which are given out by eights."""
    model = Model(TARGET, torch.bfloat16, compiler(lambda launch: {"registers": 178, "programs": 2}))
    configs = {name: rule(name, 32, 16) for name in tune_kernels.PASSES} | {"forward": Config(warps=4)}
    assert model.tightened(SLIDING, "forward", configs) == configs["forward"]  # nothing is known of it yet
    model.want(SLIDING, "forward", configs, Budget(9))
    assert model.tightened(SLIDING, "forward", configs) == replace(configs["forward"], registers=168)


def test_the_best_is_run_with_room_for_one_more_program_too() -> None:
    ran = set()

    def seconds(name: str, config: Config) -> float:
        ran.add(config.registers)
        return 1.0

    search([SLIDING], seconds)
    assert min(ran) < max(ran) == 255


def test_what_does_not_compile_is_dropped() -> None:
    def submit(launch: Launch) -> Future:
        future: Future = Future()
        future.set_exception(RuntimeError("out of registers\nand more"))
        return future

    model = Model(TARGET, torch.bfloat16, submit)
    configs = {name: rule(name, 32, 16) for name in tune_kernels.PASSES}
    model.want(DENSE, "forward", configs, Budget(9))
    assert model.predict(DENSE, "forward", configs) == Rejection("does not compile: RuntimeError: out of registers")


# What is trusted


def entry_of(found: Found, name: str, work: Work | None = None) -> dict[str, int] | None:
    own = "" if work is None else f"/{store.geometry_key(work.layer.geometry)}/{work.maps}"
    return found.entries[f"{name}/32/16{own}"]


def test_a_planted_slow_config_loses() -> None:
    """The estimate cannot tell stages 1 from 2 here, so only the planted times decide."""
    found = search([SLIDING], lambda name, config: 5.0 if config.stages == 1 else 1.0)
    rows = {row.name: row for row in found.rows}
    assert set(rows) == {"forward", "query_backward", "key_backward"}
    for row in rows.values():
        assert (row.before, row.after) == (5.0, 1.0)
        assert row.config.stages > 1
    assert entry_of(found, "forward")["stages"] > 1


def test_a_planted_wrong_config_is_rejected_and_the_next_taken() -> None:
    def seconds(name: str, config: Config) -> float | Rejection:
        if config.stages == 3:
            return Rejection("wrong out (error 3.0e-01)")
        return 1.0 if config.stages == 2 else 5.0

    found = search([SLIDING], seconds)
    assert all(row.config.stages == 2 for row in found.rows)
    assert any("14x14-d1 h2 b2 forward Config(" in each and "wrong out" in each for each in found.wrong)
    assert all(entry["stages"] == 2 for entry in found.entries.values() if entry)


def test_a_layer_gets_its_own_config_only_if_the_general_one_is_worse_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_kernels, "GENERAL", 99)

    def model_seconds(work: Work) -> Callable[[str, Config], float]:
        best = 64 if work is DENSE else 32
        return lambda name, config: 1.0 if config.rows == best else 2.0

    model = Model(TARGET, torch.bfloat16, compiler())
    clocks = {work: PlantedClock(model_seconds(work)) for work in (DENSE, SLIDING)}
    found = Search([SLIDING, DENSE], model, Budget(1e6), "", clocks.__getitem__, bar=None).run()
    assert entry_of(found, "forward")["rows"] == 32  # three sliding layers to one dense
    assert entry_of(found, "forward", SLIDING) is None
    assert entry_of(found, "forward", DENSE)["rows"] == 64
    assert {(row.work, row.own) for row in found.rows if row.name == "forward"} == {(SLIDING, False), (DENSE, True)}


def test_single_layers_decide_for_themselves_alone() -> None:
    found = search([SLIDING], lambda name, config: 5.0 if config.stages == 1 else 1.0, general=False)
    assert found.entries
    assert all(key.endswith("/14x14-k7x7-d1x1/4") for key in found.entries)


def test_without_a_gpu_the_estimate_decides() -> None:
    """Planted code that is shorter with two warps must win where nothing is run."""
    found = search(
        [SLIDING], submit=compiler(lambda x: {"chunk_length": 10 if x.options["num_warps"] == 2 else 100_000})
    )
    assert found.rows
    assert {row.config.warps for row in found.rows} == {2}
    assert all(row.after < row.before for row in found.rows)


def test_passes_that_a_layer_does_not_have_are_not_tuned() -> None:
    found = search([DENSE, SLIDING])
    assert {(row.work, row.name) for row in found.rows} == {
        (DENSE, "forward"), (DENSE, "closed_backward"),
        (SLIDING, "forward"), (SLIDING, "query_backward"), (SLIDING, "key_backward"),
    }  # fmt: skip


def test_what_is_in_use_and_must_not_ship_is_named() -> None:
    configs.user_table("sm_90").update({"forward/32/16": asdict(Config(warps=2))})
    configs.forget_tables()
    judge = compiler(lambda launch: {"complaints": ["spills"] * (launch.options["num_warps"] == 2)})
    found = search([DENSE], submit=judge)
    assert any("forward Config(" in each and "which is in use: spills" in each for each in found.wrong)
    row = next(row for row in found.rows if row.name == "forward")
    assert row.before == math.inf > row.after
    shown = kernel_report(found, Part("sm_90", 32, "bfloat16", (DENSE,), True))
    assert "rejected" in shown.splitlines()[2]


# The budget


def test_a_budget_that_ends_early_changes_nothing() -> None:
    ran = []
    found = search([SLIDING, DENSE], lambda name, config: ran.append(name) or 1.0, budget=1e-6)
    assert found.entries == {}
    assert found.unreached == [SLIDING, DENSE]
    assert found.unseen[0] == found.unseen[1] > 0
    assert ran == []


def test_what_was_found_within_the_budget_is_kept() -> None:
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()

    def seconds(name: str, config: Config) -> float:
        clock.now += 1.0
        return 5.0 if config.stages == 1 else 1.0

    model = Model(TARGET, torch.bfloat16, compiler())
    found = Search([SLIDING, DENSE], model, Budget(150, clock), "", lambda work: PlantedClock(seconds), bar=None).run()
    assert clock.now <= 151
    assert {row.work for row in found.rows} >= {SLIDING}
    assert found.rows


def test_kernels_that_were_not_compiled_in_time_are_not_taken() -> None:
    model = Model(TARGET, torch.bfloat16, lambda launch: Future())
    configs = {name: rule(name, 32, 16) for name in tune_kernels.PASSES}
    model.want(DENSE, "forward", configs, Budget(9))
    model.finish(Budget(0.01))
    assert model.predict(DENSE, "forward", configs) == Rejection("was not compiled within the budget")


# Around it


def test_triton_s_own_cache_is_not_touched() -> None:
    before = triton.knobs.cache.dir, os.environ.get("TRITON_CACHE_DIR")
    with tune_kernels.private_cache():
        inside = triton.knobs.cache.dir
        assert os.environ["TRITON_CACHE_DIR"] == inside != before[0]
        assert Path(inside).is_dir()
    assert (triton.knobs.cache.dir, os.environ.get("TRITON_CACHE_DIR")) == before
    assert not Path(inside).exists()


def test_configs_in_use_are_those_and_then_no_longer() -> None:
    choose = schedule.choose_config
    with tune_kernels.in_use({"forward": Config(rows=16)}):
        assert schedule.choose_config("forward", 32, 16, "sm_90").rows == 16
    assert schedule.choose_config is choose
    assert schedule.schedule_of.cache_info().currsize == 0


def test_gpus_that_the_model_does_not_know() -> None:
    assert target_of(Architecture("sm_90", TARGET.shared, TARGET.multiprocessors, "NVIDIA H200")) == TARGET
    unknown = target_of(Architecture("sm_121", 99 << 10, 48, "NVIDIA GB10"))
    assert unknown == replace(TARGETS["sm_120"], name="sm_121", multiprocessors=48)
    assert target_of(Architecture("sm_75", 64 << 10, 40)).gpu == TARGETS["sm_80"].gpu
    assert target_of(Architecture("gfx950", 160 << 10, 256)).gpu == TARGETS["gfx942"].gpu


PLANTED = """
import time
import torch
from dinat_triton.tuner.layer_run import LayerRun
from dinat_triton.tuner.search import Budget, Rejection, race
from dinat_triton.tuner.configs import PASSES, Clock
from dinat_triton.kernels import attention, schedule
from dinat_triton.kernels.configs import Config, rule
from dinat_triton.layers import Layer

start = {name: rule(name, 32, 32) for name in PASSES}
clock = Clock(LayerRun(Layer("9x8", (9, 8), 1, (1, 1)), 1, torch.float32, torch.device("cpu"), "triton"))
clock.run.seconds = lambda backward: (lambda t: (clock.run.forward(), time.perf_counter() - t)[1])(time.perf_counter())
rows = {rows: Config(rows=rows, chunk=32, one_chunk=32, stages=1) for rows in (16, 32, 64, 128)}
forward = attention.forward

def planted(*args, **options):
    out, lse = forward(*args, **options)
    config = schedule.choose_config("forward")
    if config == rows[64]:
        out[0, 0, 0] = out[0, 0, 1]
    if config == rows[128]:
        written, out = out, torch.empty_like(out)
        out[:, 1:] = written[:, 1:]
    if config == rows[32]:
        time.sleep(1)
    return out, lse

attention.forward = planted
score = lambda config: clock.score("forward", start | {"forward": config})
found = race([rows[32], rows[64], rows[128], rows[16]], score, Budget(1e6), 3)
assert found.winner(rows[32]) == rows[16], found
for config, why in found.rejected.items():
    print(config.rows, why)
"""


def test_a_wrong_kernel_and_a_slow_one_lose_when_run() -> None:
    """The real kernels, interpreted: a token is wrong or missing under two configs, under another they sleep."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLANTED], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    wrong, missing = ran.stdout.splitlines()
    assert wrong.startswith("64 wrong out (error ")
    assert missing.startswith("128 wrong out (error nan)")
