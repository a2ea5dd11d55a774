"""Tuning the tiles of the CPU, and the command around all tuning."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import triton

from dinat_triton import cli, store, tiled
from dinat_triton.kernels import configs
from dinat_triton.kernels.configs import Config, rule
from dinat_triton.layers import Layer, layers_of
from dinat_triton.offline.targets import TARGETS
from dinat_triton.tuner import configs as tune_kernels
from dinat_triton.tuner.layer_run import LayerRun
from dinat_triton.tuner.search import Budget, Work
from dinat_triton.tuner.tiles import CONSTANTS, Clock, Sample, fit, losses, report_on_model, tune_tiles

WORK = Work(Layer("24x24-d1", (24, 24), 4, (1, 1)), 1)
RANKED = tiled.modelled_tiles(WORK.layer.geometry, 1, 4)
KEY = f"float32/{torch.get_num_threads()}/24x24-k7x7-d1x1/4"
compiles = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the kernels are interpreted")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(store.ENVIRONMENT, str(tmp_path / "cache"))
    for forget in (configs.forget_tables, tiled.forget_tiles):
        forget()
    yield tmp_path / "cache"
    for forget in (configs.forget_tables, tiled.forget_tiles):
        forget()


class PlantedRun:
    """A layer whose times and results are what the test says of the tile that the backend would take."""

    def __init__(self, seconds: dict[tuple[int, ...], float], wrong: tuple[int, ...] | None = None):
        self.times, self.wrong = seconds, wrong

    @property
    def tile(self) -> tuple[int, ...]:
        return tiled.choose_tile(WORK.layer.geometry, 1, 4)

    def check(self) -> str | None:
        return "wrong dk (error 1.0e+00)" if self.tile == self.wrong else None

    def seconds(self, backward: bool) -> float:
        return self.times.get(self.tile, 1.0)


def tune(run: PlantedRun, seconds: float = 1e6):
    return tune_tiles([WORK], torch.float32, Budget(seconds), clock_of=lambda work: Clock(run), bar=None)


# Tiles


def test_a_planted_slow_tile_loses_and_the_fast_one_is_stored() -> None:
    found = tune(PlantedRun({RANKED[0]: 9.0, RANKED[2]: 0.5}))
    assert found.entries == {KEY: list(RANKED[2])}
    row = found.rows[0]
    assert (row.before, row.after, row.tile, row.changed) == ((9.0, 18.0), (0.5, 1.0), RANKED[2], True)


def test_a_planted_wrong_tile_is_rejected_and_the_next_taken() -> None:
    found = tune(PlantedRun({RANKED[1]: 0.1, RANKED[2]: 0.5}, wrong=RANKED[1]))
    assert found.entries == {KEY: list(RANKED[2])}
    assert found.wrong == [f"24x24-d1 h4 b1 {RANKED[1]}: wrong dk (error 1.0e+00)"]


def test_a_wrong_backend_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real backend, made wrong for one tile: its backward forgets one gradient."""
    run = LayerRun(WORK.layer, 1, torch.float32, torch.device("cpu"), "tiled")
    backward = tiled.backward

    def planted(*args, **options):
        found = backward(*args, **options)
        if tiled.choose_tile() == RANKED[1]:
            args[-1][0][0, 5, 5] = 0
        return found

    monkeypatch.setattr(tiled, "backward", planted)
    finished = {tile: Clock(run).score(tile) for tile in RANKED[:2]}
    assert isinstance(finished[RANKED[0]], float)
    assert "wrong dq" in finished[RANKED[1]].reason


def test_the_model_s_own_choice_needs_no_entry() -> None:
    assert tune(PlantedRun({RANKED[0]: 0.5})).entries == {KEY: None}


def test_an_entry_that_is_no_longer_the_best_goes() -> None:
    tiled.user_tiles().update({KEY: list(RANKED[3])})
    tiled.forget_tiles()
    found = tune(PlantedRun({RANKED[0]: 0.5, RANKED[3]: 0.9}))
    assert found.entries == {KEY: None}
    assert found.rows[0].before == (0.9, 1.8)


def test_the_budget_ends_it() -> None:
    found = tune(PlantedRun({}), seconds=1e-9)
    assert (found.entries, found.rows, found.unreached) == ({}, [], [WORK])


# The model


def planted_samples(constants: dict[str, float]) -> list[Sample]:
    samples = []
    for layer in layers_of("dinat_mini@224"):
        for tile in tiled.modelled_tiles(layer.geometry, 1, layer.heads)[:4]:
            units = tiled.tile_work(layer.geometry, 1, layer.heads, tile)
            ns = sum(n * constants[name] for n, name in zip(units, CONSTANTS, strict=True))
            samples.append(Sample(Work(layer, 1), tile, units, ns))
    return samples


def test_planted_constants_are_found() -> None:
    planted = {"SCORE_NS": 2.0, "TOKEN_NS": 5.0, "ENTRY_NS": 0.0, "CLASS_NS": 40_000.0}
    assert fit(planted_samples(planted)) == pytest.approx(planted, rel=1e-6, abs=1e-6)


def test_no_constant_is_negative() -> None:
    planted = {"SCORE_NS": 2.0, "TOKEN_NS": 5.0, "ENTRY_NS": 0.0, "CLASS_NS": -500.0}
    found = fit(planted_samples(planted))
    assert found["CLASS_NS"] == 0
    assert min(found.values()) >= 0 < found["SCORE_NS"]


def test_what_the_model_s_choices_lose() -> None:
    samples = planted_samples({name: getattr(tiled, name) for name in CONSTANTS})
    assert losses(samples) == pytest.approx([1.0] * 7)
    first, second, *others = samples
    halved = [first, Sample(second.work, second.tile, second.units, first.ns / 2), *others]
    assert max(losses(halved)) == pytest.approx(2.0)
    assert "2.00x at worst" in report_on_model(halved)
    assert f"SCORE_NS {tiled.SCORE_NS:g} (here " in report_on_model(halved)
    assert "too few" in report_on_model(samples[:3])


# The command


def run(*arguments: str) -> int:
    return cli.main(["tune", *arguments])


def test_the_cpu_is_tuned_for_real(cache: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layers_of("dinat_mini@224")[-1]
    slow = tuple(1 for _ in layer.shape)
    ranked = [slow, *tiled.modelled_tiles(layer.geometry, 1, layer.heads)[:2]]
    monkeypatch.setattr(tiled, "modelled_tiles", lambda *_: ranked)
    assert run("--device", "cpu", "--layers", "dinat_mini@224:7x7-d1", "--budget", "4") == 0
    shown = capsys.readouterr().out
    path = tiled.user_tiles().path
    assert path.parent == cache
    assert "measured here, every tile checked against float64" in shown
    assert f"Written to {path}" in shown
    assert "7x7-d1 h16 b1" in shown
    data = json.loads(path.read_text())
    assert data["source"].startswith("measured on ")
    # This process uses it at once.
    assert list(tiled.choose_tile(layer.geometry, 1, layer.heads)) in data["tiles"].values()
    assert tiled.choose_tile(layer.geometry, 1, layer.heads) != slow


def test_a_dry_run_writes_nothing(cache: Path) -> None:
    assert run("--device", "cpu", "--layers", "dinat_mini@224:7x7-d1", "--budget", "1", "--dry-run") == 0
    assert not cache.exists()


@pytest.fixture
def planted_search(monkeypatch: pytest.MonkeyPatch) -> dict[str, Config]:
    """What the search without a GPU will find."""
    entries = {"forward/32/16": Config(rows=16), "forward/32/16/7x7-k7x7-d1x1/256": Config(rows=32),
               "key_backward/32/16": rule("key_backward", 32, 16)}  # fmt: skip

    def search(works, dtype, target, budget, **options) -> tune_kernels.Found:
        assert options["general"]
        row = tune_kernels.Row(works[0], "forward", 2e-6, 1e-6, Config(rows=16), False)
        return tune_kernels.Found({key: asdict(config) for key, config in entries.items()}, [row])

    monkeypatch.setattr(tune_kernels, "tune_modelled", search)
    return entries


def test_a_modelled_gpu_says_so_and_is_used(planted_search: dict, capsys: pytest.CaptureFixture) -> None:
    assert configs.choose_config("forward", 32, 16, "sm_100") != Config(rows=16)
    assert run("--arch", "sm_100") == 0
    shown = capsys.readouterr().out
    assert "MODELLED" in shown
    assert "no GPU was used, and no result checked" in shown
    assert "2.000x as fast as before" in shown
    # This process uses it at once.
    assert configs.choose_config("forward", 32, 16, "sm_100") == Config(rows=16)
    geometry = layers_of("dinat_mini@224")[-1].geometry
    assert configs.choose_config("forward", 32, 16, "sm_100", "", geometry, 256) == Config(rows=32)


def test_an_export_ships(planted_search: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written, put where tables ship, and read back by a user who has none of his own."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    assert run("--arch", "sm_80", "--export", str(folder)) == 0
    assert {path.stem for path in folder.iterdir()} == {"sm_80", "sm_86", "sm_89", "sm_120"}
    data = json.loads((folder / "sm_80.json").read_text())
    assert data["source"] == "offline inspection"
    assert set(data["versions"]) == {"triton", "torch"}
    assert data["date"]
    # What only says what the rule says is left out.
    assert set(data["configs"]) == set(planted_search) - {"key_backward/32/16"}
    monkeypatch.setattr(configs, "TABLES", folder)
    monkeypatch.setenv(store.ENVIRONMENT, str(tmp_path / "nobody"))
    configs.forget_tables()
    assert configs.load_table("sm_89") == {key: planted_search[key] for key in data["configs"]}
    assert configs.choose_config("forward", 32, 16, "sm_89") == Config(rows=16)
    assert run("--arch", "sm_90", "--export", str(tmp_path / "one.json")) == 0
    assert json.loads((tmp_path / "one.json").read_text())["configs"] == data["configs"]


@compiles
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_tiles_are_measured_and_kernels_modelled(
    planted_search: dict, capsys: pytest.CaptureFixture, cache: Path
) -> None:
    assert run("--layers", "dinat_mini@224", "--budget", "2") == 0
    shown = capsys.readouterr().out
    assert shown.index("tiles of the `tiled` backend, measured") < shown.index("sm_90, bfloat16, head dim 32: MODELLED")
    assert {path.name for path in cache.glob("*.json")} == {tiled.user_tiles().path.name, "configs-sm_90.json"}


@compiles
@pytest.mark.slow
def test_a_search_with_real_compilers(capsys: pytest.CaptureFixture, cache: Path) -> None:
    assert run("--arch", "sm_90", "--layers", "dinat_mini@224", "--budget", "60") == 0
    data = json.loads((cache / "configs-sm_90.json").read_text())
    assert "forward/32/16" in data["configs"]
    assert all(Config(**entry) for entry in data["configs"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "dinat_mni@224"], "unknown layers 'dinat_mni@224': did you mean dinat_mini@224"),
        (["--layers", "dinat_mini@224:8x8"], "unknown layers of dinat_mini@224 '8x8'"),
        (["--arch", "sm_91"], "unknown arch 'sm_91': did you mean sm_90"),
        (["--arch", "volta"], f"there are {', '.join(TARGETS)}"),
        (["--dtype", "float61"], "unknown dtype 'float61': did you mean"),
        (["--budget", "0"], "the budget must be a positive number of seconds, got 0"),
        (["--budget", "nan"], "positive number of seconds"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--jobs", "-1"], "--jobs must be at least 1, got -1"),
        (["--dim", "32", "300"], "--dim must be between 1 and 256, got 32 300"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["--device", "cpu", "--export", "x.json"], "only tiles of the CPU are tuned"),
        (["--arch", "sm_80", "sm_90", "--export", "x.json"], "--export must be a folder for 2 architectures"),
        (["--arch", "sm_80", "--export", "no/such/x.json"], "--export must name a file in a folder that exists"),
        (["--arch", "sm_80", "--dry-run", "--export", "x.json"], "--dry-run writes nothing"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_no_reason_to_take_the_cpu(capsys: pytest.CaptureFixture) -> None:
    assert run("--device", "cuda") == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_an_unwritable_cache_is_said_before_anything_is_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(store.ENVIRONMENT, str(tmp_path / "file" / "cache"))
    for arguments in (["--device", "cpu"], ["--arch", "sm_90"]):
        assert run(*arguments) == 2
        captured = capsys.readouterr()
        assert "cannot be written: " in captured.err
        assert store.ENVIRONMENT in captured.err
        assert captured.out == ""


def test_every_architecture_of_the_model_can_be_named() -> None:
    from dinat_triton.commands.tune import ARCHITECTURES

    assert set(ARCHITECTURES) == set(TARGETS)
