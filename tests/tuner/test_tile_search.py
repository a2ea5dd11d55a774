"""Tuning the tiles of the CPU, and the command around all tuning."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dinat_triton import cli, store, tiled
from dinat_triton.kernels import configs
from dinat_triton.kernels.configs import Config, rule
from dinat_triton.layers import Layer, layers_of
from dinat_triton.tuner import kernel_search
from dinat_triton.tuner.layer_run import LayerRun
from dinat_triton.tuner.search import Budget, Found, Rejection, Row
from dinat_triton.tuner.tile_search import CONSTANTS, Sample, Tile, fit, tune_tiles

LAYER = Layer("24x24-d1", (24, 24), 4, (1, 1))
RANKED = tiled.modelled_tiles(LAYER.geometry, 1, 4)
KEY = f"float32/{torch.get_num_threads()}/24x24-k7x7-d1x1/4"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_tuned: Callable[[], None]) -> Path:
    monkeypatch.setenv(store.ENVIRONMENT, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_planted_slow_and_wrong_tiles_lose_and_the_fast_one_is_stored() -> None:
    def clock(tile: Tile, backward: bool) -> float | Rejection:
        seconds = {RANKED[0]: 9.0, RANKED[2]: 0.5}
        return Rejection("wrong dk") if tile == RANKED[1] else seconds.get(tile, 1.0)

    found = tune_tiles([LAYER], torch.float32, Budget(1e6), clock_of=lambda layer: clock)[0]
    assert found.entries == {KEY: list(RANKED[2])}
    assert found.wrong == [f"24x24-d1 h4 b1 {RANKED[1]}: wrong dk"]
    forward, step = (Row(LAYER, name, 9.0, 0.5, RANKED[2], True) for name in ("forward", "forward+backward"))
    assert found.rows == [forward, replace(step, before=18.0, after=1.0)]


def test_a_wrong_backend_is_noticed() -> None:
    """The real backend, made wrong for two tiles: a gradient is forgotten, and a token is not written."""

    def forward(*arguments, tile: Tile):
        out, lse = tiled.forward(*arguments, tile=tile)
        partial = torch.empty_like(out)
        partial[:, 1:] = out[:, 1:]
        return partial if tile == RANKED[2] else out, lse

    def backward(*arguments, tile: Tile):
        found = tiled.backward(*arguments, tile=tile)
        arguments[-1][0][0, 5, 5] *= tile != RANKED[1]
        return found

    backend = SimpleNamespace(forward=forward, backward=backward)
    run = LayerRun(LAYER, torch.float32, torch.device("cpu"), backend, lambda tile: {"tile": tile})
    right, wrong, missing = (run.score(tile, backward=True) for tile in RANKED[:3])
    assert isinstance(right, float)
    assert "wrong dq" in wrong.reason
    assert "out (error nan)" in missing.reason


def test_planted_constants_are_found_and_none_is_negative() -> None:
    def found(*constants: float) -> dict[str, float]:
        samples = []
        for layer in layers_of("dinat_mini@224"):
            for tile in tiled.modelled_tiles(layer.geometry, 1, layer.heads)[:4]:
                units = tiled.tile_work(layer.geometry, 1, layer.heads, tile)
                samples.append(Sample(layer, tile, units, sum(a * b for a, b in zip(units, constants, strict=True))))
        return fit(samples)

    planted = (2.0, 5.0, 0.0, 40_000.0)
    assert found(*planted) == pytest.approx(dict(zip(CONSTANTS, planted, strict=True)), rel=1e-6, abs=1e-6)
    assert min(found(2.0, 5.0, 0.0, -500.0).values()) >= 0


def test_the_cpu_is_tuned_for_real(
    cache: Path, monkeypatch: pytest.MonkeyPatch, forget_tuned: Callable[[], None]
) -> None:
    layer = layers_of("dinat_mini@224")[-1]
    slow = tuple(1 for _ in layer.shape)
    ranked = [slow, *tiled.modelled_tiles(layer.geometry, 1, layer.heads)[:2]]
    monkeypatch.setattr(tiled, "modelled_tiles", lambda *_: ranked)
    arguments = ["tune", "--device", "cpu", "--layers", "dinat_mini@224:7x7-d1", "--budget", "30"]
    assert cli.main([*arguments, "--dry-run"]) == 0
    assert not cache.exists()
    assert cli.main(arguments) == 0
    forget_tuned()
    assert tiled.choose_tile(layer.geometry, 1, layer.heads) in ranked[1:]


def test_modelled_configs_are_used_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_tuned: Callable[[], None]
) -> None:
    """Found without a GPU, put where tables ship, and read back by a user who has none of his own."""
    planted = {"forward/32/16": Config(rows=16), "forward/32/16/7x7-k7x7-d1x1/256": Config(rows=32),
               "key_backward/32/16": rule("key_backward", 32, 16)}  # fmt: skip

    def search(layers, *_, general: bool, jobs: int) -> tuple[Found, tuple[int, int]]:
        row = Row(layers[0], "forward", 2e-6, 1e-6, Config(rows=16), False)
        return Found({key: asdict(config) for key, config in planted.items()}, [row]), (1, 1)

    monkeypatch.setattr(kernel_search, "tune_kernels", search)
    folder = tmp_path / "shipped"
    folder.mkdir()
    arguments = ["tune", "--arch", "sm_80", "--out", str(folder)]
    assert cli.main(arguments) == 0
    forget_tuned()
    geometry = layers_of("dinat_mini@224")[-1].geometry
    assert configs.choose_config("forward", 32, 16, "sm_80", "", geometry, 256) == Config(rows=32)
    assert cli.main(arguments) == 2  # it is there already
    monkeypatch.setattr(configs, "TABLES", folder)
    monkeypatch.setenv(store.ENVIRONMENT, str(tmp_path / "nobody"))
    forget_tuned()
    # What only says what the rule says is left out, and sm_89 is like sm_80.
    assert configs.load_table("sm_89") == {key: config for key, config in planted.items() if "key" not in key}
