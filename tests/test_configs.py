"""The choice of launch options: the user's tables over shipped ones, over a rule that always answers."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
import timm
import torch

from dinat_triton import store
from dinat_triton.geometry import Geometry
from dinat_triton.kernels import configs, schedule
from dinat_triton.kernels.configs import Architecture, Config, Preset, choose_config, rule
from dinat_triton.layers import layers_of
from dinat_triton.offline.targets import TARGETS
from dinat_triton.passes import Pass

GEOMETRY = Geometry((56, 56), (7,), (8,))
OTHER = Geometry((56, 56), (7,), (1,))


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_tuned: Callable[[], None]) -> Path:
    """An empty folder in place of the shipped tables, and another in place of the user's."""
    monkeypatch.setattr(configs, "TABLES", tmp_path)
    monkeypatch.setenv(store.ENVIRONMENT, str(tmp_path / "user"))
    return tmp_path


@pytest.mark.parametrize("text", ["", "[]", '{"configs": {"forward/32/16": {"row": 64}}}', "\udc80"])
def test_a_corrupt_table_is_named_and_ignored(text: str, tables: Path) -> None:
    (tables / "sm_77.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=r"ignoring the tuned table .*sm_77\.json.*the general rule is used"):
        assert choose_config("forward", 32, 16, "sm_77") == rule("forward", 32, 16)


def test_the_user_goes_before_what_ships_and_the_exact_before_the_general(
    tables: Path, forget_tuned: Callable[[], None]
) -> None:
    general, exact = "forward/32/16", "forward/32/16/56x56-k7x7-d8x8/256"

    def choose(
        geometry: Geometry | None = GEOMETRY, maps: int = 256, device: str = "Some GPU", dim: int = 32
    ) -> Config:
        forget_tuned()
        return choose_config("forward", dim, 16, "sm_77", device, geometry, maps)

    assert choose() == rule("forward", 32, 16)
    for chunk, (device, key) in enumerate(product((None, "sm_77", "Some GPU"), (general, exact)), 4):
        entry = {key: asdict(Config(chunk=2**chunk))}
        if device:
            configs.user_table(device).update(entry)
        else:
            (tables / "sm_77.json").write_text(json.dumps({"configs": {general: asdict(Config(chunk=16))} | entry}))
        assert choose().chunk == 2**chunk
    assert {choose(*other).chunk for other in ((OTHER,), (None,), (GEOMETRY, 2048))} == {256}
    assert choose(maps=1024) == choose(maps=64) == Config(chunk=512)
    assert choose(dim=64) == rule("forward", 64, 16)
    assert choose(device="Another GPU").chunk == 128


@pytest.mark.parametrize(("name", "bound"), [("sm_90", 168), ("gfx942", None)])
def test_launches_ask_for_their_own_config_and_registers_bind_nvidias_compiler(
    name: str, bound: int | None, tables: Path
) -> None:
    def scheduled(geometry: Geometry, *own: Config) -> schedule.Schedule:
        preset = Preset(Architecture(name, 99 << 10, 20, "Some GPU"), own * len(Pass))
        sizes = (4, 2, 2, 32, 32, torch.bfloat16, torch.device("cpu"))
        return schedule.schedule_of(schedule.problem_of(geometry, *sizes, preset=preset), Pass.FORWARD)

    configs.user_table("Some GPU").update({"forward/32/16/56x56-k7x7-d1x1/8": asdict(Config(rows=16))})
    assert scheduled(OTHER).layout.row_slots == 16
    assert scheduled(Geometry((48, 48), (7,))).layout.row_slots == 64
    assert scheduled(OTHER, Config(registers=168)).options.get("maxnreg") == bound
    assert "maxnreg" not in scheduled(OTHER, Config()).options


@pytest.mark.parametrize("path", sorted(configs.TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables_hold_only_what_differs_from_the_rule(path: Path) -> None:
    assert path.stem in TARGETS
    assert all((store.PACKAGE / name).is_file() for name in configs.SOURCES)
    for key, entry in json.loads(path.read_text())["configs"].items():
        name, dim, bits, *of = key.split("/")
        assert name in list(Pass)
        assert of not in ([], ["unbiased"]) or Config(**entry) != rule(name, int(dim), int(bits), biased=not of), key


@pytest.mark.parametrize("changed", [{"rows": 0}, {"chunk": 24}, {"warps": 3}, {"stages": True}, {"programs": 1.5}])
def test_a_config_refuses_nonsense(changed: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(changed))):
        Config(**changed)


@pytest.mark.parametrize("name", ["dinat_mini", "dinat_base"])
def test_layers_are_those_of_the_models(name: str) -> None:
    model = timm.create_model(name, device="meta")
    attention = [block.attn for level in model.levels for block in level.blocks]
    counts = Counter((layer.num_heads, layer.window[4]) for layer in attention)
    assert {(layer.heads, layer.dilation[0]): layer.count for layer in layers_of(f"{name}@224")} == counts
