"""The files that tuning leaves behind: safe to read whatever is in them, safe to write by two at once."""

import json
import multiprocessing
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dinat_triton as dt
from dinat_triton import store, tiled
from dinat_triton.geometry import Geometry

GEOMETRY = Geometry((24, 24), (7,))


def number(key: str, entry: Any) -> int:
    if type(entry) is not int:
        raise TypeError(f"{entry!r} is no number")
    return entry


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> store.Table:
    monkeypatch.setenv(store.ENVIRONMENT, str(tmp_path / "cache"))
    return store.Table("numbers", "Some GPU (R)", "triton 3.6.0", ("plan.py", "kernels/forward.py"), number)


def quiet(table: store.Table) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return table.read()


def test_what_is_written_is_read_and_merged(table: store.Table) -> None:
    assert quiet(table) == {}
    path = table.update({"a": 1, "b": 2}, source="measured")
    data = json.loads(path.read_text())
    assert (path.name, data["source"]) == ("numbers-some-gpu-r.json", "measured")
    table.update({"b": 3, "c": 4, "a": None, "never": None})
    other = replace(table, device="Another GPU")
    other.update({"a": 5})
    assert (quiet(replace(table)), quiet(other)) == ({"b": 3, "c": 4}, {"a": 5})
    files = {each.path.with_suffix(ending) for each in (table, other) for ending in (".json", ".lock")}
    assert set(path.parent.iterdir()) == files


def write(table: store.Table, name: str, together: Any) -> None:
    together.wait()
    for n in range(40):
        table.update({f"{name}{n}": n})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_processes_that_write_at_once_lose_nothing(table: store.Table) -> None:
    forks = multiprocessing.get_context("fork")
    together = forks.Barrier(3)
    writers = [forks.Process(target=write, args=(table, name, together)) for name in "xy"]
    for writer in writers:
        writer.start()
    together.wait()
    while any(writer.is_alive() for writer in writers):  # what is read meanwhile is whole
        assert set(quiet(table).values()) <= set(range(40))
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert quiet(table) == {f"{name}{n}": n for name in "xy" for n in range(40)}


GARBAGE = ["", "{", '{"stamp": {"dev', "[]", "{}", '"x"', "[" * 100_000, '{"stamp": [], "numbers": {}}', "\udc80"]
ENTRIES = [[], 3, {"a": "1"}, {"a": None}, {"a": 1, "b": {}}, {"a": True}, {f"a/{'9' * 400}": 1}]


@pytest.mark.parametrize("content", [*GARBAGE, *({"numbers": entries} for entries in ENTRIES)])
def test_what_is_no_table_is_named_ignored_and_replaced(content: str | dict, table: store.Table) -> None:
    path = table.update({"a": 1})
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=rf"ignoring the tuned table .*{path.name}.*dinat-triton tune.*or delete"):
        assert table.read() == {}
    table.update({"b": 2})
    assert quiet(table) == {"b": 2}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_ignored(make: Any, table: store.Table) -> None:
    path = table.update({"a": 1})
    path.unlink()
    make(path)
    with pytest.warns(UserWarning, match="ignoring.*it is no file"):
        assert table.read() == {}


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"compiler": "triton 3.7.0"}, "compiler 'triton 3.6.0', not 'triton 3.7.0'"),
        ({"device": "Some GPU-R"}, r"device 'Some GPU \(R\)', not 'Some GPU-R'"),
    ],
)
def test_a_stale_table_is_ignored_and_replaced(changed: dict, what: str, table: store.Table) -> None:
    table.update({"a": 1})
    later = replace(table, **changed)
    assert later.path == table.path
    with pytest.warns(UserWarning, match=f"it was made for {what}"):
        assert later.read() == {}
    later.update({"b": 2})
    assert quiet(later) == {"b": 2}


def test_a_folder_that_cannot_be_written(table: store.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(store.ENVIRONMENT, str(tmp_path / "file" / "cache"))
    assert quiet(table) == {}
    for write in (table.check_writable, lambda: table.update({"a": 1})):
        with pytest.raises(RuntimeError, match=rf"{table.path.name} cannot be written.*{store.ENVIRONMENT}"):
            write()


def test_keys_tell_geometries_apart() -> None:
    keys = [
        store.geometry_key(Geometry((24, 24), (7,), **options))
        for options in ({}, {"dilation": (3,)}, {"stride": (2,)}, {"is_causal": (True, False)}, {"dilation": (1, 3)})
    ]
    assert keys[0] == "24x24-k7x7-d1x1"
    assert len(set(keys)) == len(keys)


def test_the_nearest_number_of_maps_is_taken() -> None:
    entries = {"k/8": "eight", "k/64": "many", "k": "general", "k/x": "no number", "k2/16": "another key"}
    found = {maps: store.nearest(entries, "k", maps) for maps in (1, 2, 8, 16, 30, 256, 257)}
    assert found == {1: None, 2: "eight", 8: "eight", 16: "eight", 30: "many", 256: "many", 257: None}


def test_a_tuned_tile_goes_before_the_model(
    table: store.Table, monkeypatch: pytest.MonkeyPatch, forget_tuned: Callable[[], None]
) -> None:
    tiles = tiled.user_tiles()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    modelled = tiled.choose_tile(GEOMETRY, 2, 4)
    own = (5, 3)
    assert own != modelled
    tiles.update({f"{tiled.tile_key(GEOMETRY, torch.float32, 3)}/8": list(own)})
    assert tiled.choose_tile(GEOMETRY, 2, 4) == modelled  # what was chosen stays until it is asked for anew
    forget_tuned()
    assert tiled.choose_tile(GEOMETRY, 2, 4) == tiled.choose_tile(GEOMETRY, 1, 4) == own
    for other in ((GEOMETRY, 64, 4), (GEOMETRY, 2, 4, torch.bfloat16), (GEOMETRY, 2, 4, torch.float32, "mps")):
        assert tiled.choose_tile(*other) == tiled.modelled_tiles(*other[:3])[0]
    query, key, value = torch.randn(3, 2, 24, 24, 4, 8)
    found, expected = (dt.na2d(query, key, value, 7, backend=backend) for backend in ("tiled", "reference"))
    torch.testing.assert_close(found, expected)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert tiled.choose_tile(GEOMETRY, 2, 4) == modelled


@pytest.mark.parametrize(
    "entry", [3, [], [0, 1], [1.5, 1], "4x4", [True, True], None, [4], [4, 4, 4], [4, 25], [4, 10**400]]
)
def test_what_is_no_tile_is_refused(entry: Any) -> None:
    with pytest.raises(ValueError, match="a tile for float32/1/24x24-k7x7-d1x1/8"):
        tiled.tile_of("float32/1/24x24-k7x7-d1x1/8", entry)
