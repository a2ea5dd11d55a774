"""The choice of launch options: shipped tables over a rule that always answers."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from dinat_triton.kernels import tuning
from dinat_triton.kernels.targets import TARGETS
from dinat_triton.kernels.tuning import PASSES, Config, choose_config, load_table, rule
from dinat_triton.layers import SETTINGS, layers_of

TABLES = sorted(tuning.TABLES.glob("*.json"))


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in place of the shipped tables."""
    caches = (choose_config, load_table)
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


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


def test_a_choice_is_made_once(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tables / "sm_77.json").write_text('{"configs": {}}')
    reads = []
    loads = json.loads
    monkeypatch.setattr(tuning.json, "loads", lambda text: reads.append(text) or loads(text))
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
        name, dim, bits = key.split("/")
        assert name in PASSES
        assert int(dim) in (16, 32, 64, 128, 256)
        assert int(bits) in (16, 32)
        assert Config(**entry) != rule(name, int(dim), int(bits)), key


@pytest.mark.parametrize("changed", [{"rows": 0}, {"chunk": 24}, {"warps": 3}, {"stages": True}, {"programs": 1.5}])
def test_a_config_refuses_nonsense(changed: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(changed))):
        Config(**changed)


@pytest.mark.parametrize("name", ["dinat_mini@225", "mini@224", "dinat_mini", ""])
def test_unknown_layers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="layers must be one of"):
        layers_of(name)


def test_layers_are_those_of_the_models() -> None:
    dinat = pytest.importorskip("dinat_triton.models.dinat")
    for setting, (_, patterns) in SETTINGS.items():
        assert patterns == dinat.DILATIONS[setting]
    for layer in layers_of("dinat_large@384"):
        assert layer.geometry.num_tokens > 0
    assert sum(layer.count for layer in layers_of("dinat_mini@224")) == 3 + 4 + 6 + 5
