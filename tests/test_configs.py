"""The choice of launch options: the user's tables over shipped ones, over a rule that always answers."""

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from dinat_triton import store
from dinat_triton.geometry import Geometry
from dinat_triton.kernels import configs, schedule
from dinat_triton.kernels.configs import PASSES, Config, Preset, choose_config, forget_tables, rule, user_table
from dinat_triton.kernels.schedule import Schedule
from dinat_triton.layers import layers_of
from dinat_triton.offline.targets import TARGETS

TABLES = sorted(configs.TABLES.glob("*.json"))
GEOMETRY = Geometry((56, 56), (7,), (8,))
OTHER = Geometry((56, 56), (7,), (1,))


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in place of the shipped tables, and another in place of the user's."""
    monkeypatch.setattr(configs, "TABLES", tmp_path)
    monkeypatch.setenv(store.ENVIRONMENT, str(tmp_path / "user"))
    forget_tables()
    yield tmp_path
    forget_tables()


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [16, 32])
def test_an_unknown_architecture_gets_the_rule(name: str, dim: int, bits: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_config(name, dim, bits, "sm_77") == rule(name, dim, bits)


def test_a_table_goes_before_the_rule(tables: Path) -> None:
    config = Config(rows=32, chunk=16)
    text = json.dumps({"configs": {"forward/32/16": asdict(config)}})
    (tables / "sm_77.json").write_text(text)
    assert choose_config("forward", 32, 16, "sm_77") == config != rule("forward", 32, 16)
    assert choose_config("forward", 64, 16, "sm_77") == rule("forward", 64, 16)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"configs": []}',
        '{"configs": {"forward/32/16": 3}}',
        '{"configs": {"forward/32/16": {"row": 64}}}',
        '{"configs": {"forward/32/16": {"rows": "many"}}}',
        '{"configs": {"forward/32/16": {"rows": 48}}}',
        '{"configs": {"forward/32/16": {"stages": 0}}}',
        "\udc80",
    ],
)
def test_a_corrupt_table_is_named_and_ignored(text: str, tables: Path) -> None:
    path = tables / "sm_77.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=rf"ignoring the tuned table .*{path.name}.*the general rule is used"):
        assert choose_config("forward", 32, 16, "sm_77") == rule("forward", 32, 16)


def write(device: str, rows: dict[str, int]) -> None:
    """Puts configs into the user's table that differ by their rows."""
    user_table(device).update({key: asdict(Config(rows=n)) for key, n in rows.items()})


def ship(arch: str, rows: dict[str, int], folder: Path) -> None:
    (folder / f"{arch}.json").write_text(json.dumps({"configs": {k: asdict(Config(rows=n)) for k, n in rows.items()}}))


def test_the_user_goes_before_what_ships_and_the_exact_before_the_general(tables: Path) -> None:
    exact = "forward/32/16/56x56-k7x7-d8x8/256"
    chosen = []

    def choose(geometry: Geometry | None = GEOMETRY, maps: int = 256) -> int:
        forget_tables()
        return choose_config("forward", 32, 16, "sm_77", "Some GPU", geometry, maps).rows

    assert choose() == rule("forward", 32, 16).rows == 64
    for step in (
        lambda: ship("sm_77", {"forward/32/16": 16}, tables),
        lambda: ship("sm_77", {"forward/32/16": 16, exact: 32}, tables),
        lambda: write("sm_77", {"forward/32/16": 128}),
        lambda: write("sm_77", {exact: 256}),
        lambda: write("Some GPU", {"forward/32/16": 512}),
        lambda: write("Some GPU", {exact: 1024}),
    ):
        step()
        chosen.append(choose())
    assert chosen == [16, 32, 128, 256, 512, 1024]
    assert choose(OTHER) == choose(None) == choose(GEOMETRY, maps=2048) == 512
    assert choose(GEOMETRY, maps=1024) == choose(GEOMETRY, maps=64) == 1024
    assert choose_config("forward", 64, 16, "sm_77", "Some GPU", GEOMETRY, 256) == rule("forward", 64, 16)
    assert choose_config("forward", 32, 16, "sm_77", "Another GPU", GEOMETRY, 256).rows == 256


def test_a_corrupt_user_table_is_ignored_once(tables: Path) -> None:
    write("Some GPU", {"forward/32/16": 512})
    user_table("Some GPU").path.write_text('{"stamp"')
    with pytest.warns(UserWarning, match="configs-some-gpu.json.*run `dinat-triton tune` again"):
        assert choose_config("forward", 32, 16, "sm_77", "Some GPU") == rule("forward", 32, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dim in (16, 64, 128):
            assert choose_config("forward", dim, 16, "sm_77", "Some GPU") == rule("forward", dim, 16)


@pytest.mark.parametrize("entry", [{"rows": 48}, {"row": 64}, {"rows": "many"}, 3, None])
def test_nonsense_in_a_user_table_is_ignored(entry: object, tables: Path) -> None:
    user_table("Some GPU").update({"forward/32/16": {"rows": 16}, "key_backward/32/16": entry or []})
    with pytest.warns(UserWarning, match=r"configs-some-gpu\.json"):
        assert choose_config("forward", 32, 16, "sm_77", "Some GPU") == rule("forward", 32, 16)


def test_other_kernels_make_a_user_table_stale(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("Some GPU", {"forward/32/16": 512})
    monkeypatch.setattr(configs.triton, "__version__", "3.5.0")
    with pytest.warns(UserWarning, match="it was made for compiler .*, not 'triton 3.5.0'"):
        assert choose_config("forward", 32, 16, "sm_77", "Some GPU") == rule("forward", 32, 16)


def test_the_sources_of_the_kernels_exist() -> None:
    assert {"plan.py", "kernels/forward.py", "kernels/backward.py", "kernels/schedule.py"} <= set(configs.SOURCES)
    assert all((store.PACKAGE / name).is_file() for name in configs.SOURCES)


def schedule_of(geometry: Geometry, preset: Preset) -> Schedule:
    sizes = (4, 2, 2, 32, 32)
    problem = schedule.problem_of(geometry, *sizes, torch.bfloat16, torch.device("cpu"), preset=preset)
    return schedule.schedule_of(problem, "forward")


def test_launches_ask_for_their_own_config(tables: Path) -> None:
    write("Some GPU", {"forward/32/16/56x56-k7x7-d1x1/8": 16})
    preset = Preset(configs.Architecture("sm_77", 99 << 10, 20, "Some GPU"))
    assert schedule_of(OTHER, preset).layout.row_slots == 16
    assert schedule_of(Geometry((48, 48), (7,)), preset).layout.row_slots == 64


@pytest.mark.parametrize(("architecture", "bound"), [("sm_90", 168), ("gfx942", None)])
def test_registers_bind_the_compiler_of_nvidia(architecture: str, bound: int | None) -> None:
    for config, expected in ((Config(registers=168), bound), (Config(), None)):
        preset = Preset(configs.Architecture(architecture, 99 << 10, 20), (config,) * len(PASSES))
        assert schedule_of(OTHER, preset).options.get("maxnreg") == expected


def test_a_choice_is_made_once(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tables / "sm_77.json").write_text('{"configs": {}}')
    reads = []
    loads = json.loads
    monkeypatch.setattr(configs.json, "loads", lambda text: reads.append(text) or loads(text))
    for _ in range(100):
        for name in PASSES:
            choose_config(name, 32, 16, "sm_77")
    assert len(reads) == 1
    assert choose_config.cache_info().misses == len(PASSES)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_shipped_tables_hold_only_what_differs_from_the_rule(path: Path) -> None:
    assert path.stem in TARGETS
    data = json.loads(path.read_text())
    assert data["source"]
    assert data["versions"]["triton"]
    assert data["configs"]
    for key, entry in data["configs"].items():
        name, dim, bits, *own = key.split("/")
        assert name in PASSES
        assert int(dim) in (16, 32, 64, 128, 256)
        assert int(bits) in (16, 32)
        assert own or Config(**entry) != rule(name, int(dim), int(bits)), key
        assert Config(**entry) == configs.config_of(key, entry)


@pytest.mark.parametrize(
    "changed", [{"rows": 0}, {"chunk": 24}, {"warps": 3}, {"stages": True}, {"programs": 1.5}, {"registers": 0}]
)
def test_a_config_refuses_nonsense(changed: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(changed))):
        Config(**changed)


@pytest.mark.parametrize("name", ["dinat_mini@225", "mini@224", "dinat_mini", ""])
def test_unknown_layers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="layers must be one of"):
        layers_of(name)


@pytest.mark.parametrize(("name", "variant"), [("dinat_mini@224", "dinat_mini"), ("dinat_base@224", "dinat_base")])
def test_layers_are_those_of_the_models(name: str, variant: str) -> None:
    model = pytest.importorskip("timm").create_model(variant, device="meta")
    attention = [block.attn for level in model.levels for block in level.blocks]
    counts = Counter((layer.num_heads, layer.window[4]) for layer in attention)
    assert {(layer.heads, layer.dilation[0]): layer.count for layer in layers_of(name)} == counts
