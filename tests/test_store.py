"""The files that tuning leaves behind: safe to read whatever is in them, safe to write by two at once."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

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


# What is written is read


def test_what_one_table_writes_another_reads(table: store.Table) -> None:
    assert quiet(table) == {}
    path = table.update({"b": 2, "a": 1}, source="measured")
    assert quiet(replace(table)) == {"a": 1, "b": 2}
    data = json.loads(path.read_text())
    assert data["source"] == "measured"
    assert data["stamp"]["device"] == "Some GPU (R)"
    assert path.name == "numbers-some-gpu-r.json"


def test_entries_are_merged_and_taken_out(table: store.Table) -> None:
    table.update({"a": 1, "b": 2})
    table.update({"b": 3, "c": 4, "a": None, "never": None})
    assert quiet(table) == {"b": 3, "c": 4}


def test_devices_do_not_share_a_file(table: store.Table) -> None:
    other = replace(table, device="Another GPU")
    table.update({"a": 1})
    other.update({"a": 2})
    assert (quiet(table), quiet(other)) == ({"a": 1}, {"a": 2})


def test_nothing_but_the_table_and_its_lock_is_left(table: store.Table) -> None:
    path = table.update({"a": 1})
    assert {each.name for each in path.parent.iterdir()} == {path.name, path.with_suffix(".lock").name}


WRITER = """
import sys
from dinat_triton import store
sources = ("plan.py", "kernels/forward.py")
table = store.Table("numbers", "Some GPU (R)", "triton 3.6.0", sources, lambda key, entry: int(entry))
print("ready", flush=True)
sys.stdin.readline()
for n in range(40):
    table.update({f"{sys.argv[1]}{n}": n})
"""


def test_processes_that_write_at_once_lose_nothing(table: store.Table) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in "xy"
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for _ in range(50):  # what is read meanwhile is whole
        assert set(quiet(table).values()) <= set(range(40))
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert quiet(table) == {f"{name}{n}": n for name in "xy" for n in range(40)}


# What must be ignored


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '"numbers"',
        "[" * 100_000,
        '{"stamp": [], "numbers": {}}',
        "\udc80",
    ],
)
def test_garbage_is_named_and_ignored(text: str, table: store.Table) -> None:
    path = table.update({"a": 1})
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(
        UserWarning, match=rf"ignoring the tuned table .*{path.name}.*dinat-triton tune.*again, or delete"
    ):
        assert table.read() == {}
    table.update({"b": 2})
    assert quiet(table) == {"b": 2}


def test_a_file_cut_short_anywhere_is_ignored(table: store.Table) -> None:
    path = table.update({f"entry {n}": n for n in range(3)})
    whole = path.read_text()
    for length in range(0, len(whole) - 2, 7):
        path.write_text(whole[:length])
        with pytest.warns(UserWarning, match="ignoring"):
            assert table.read() == {}


@pytest.mark.parametrize(
    "entries", [[], 3, {"a": "1"}, {"a": None}, {"a": 1, "b": {}}, {"a": True}, {f"a/{'9' * 400}": 1}]
)
def test_entries_of_the_wrong_type_are_ignored_and_replaced(entries: Any, table: store.Table) -> None:
    path = table.update({"z": 26})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"numbers": entries}))
    with pytest.warns(UserWarning, match="ignoring"):
        assert table.read() == {}
    table.update({"c": 3})
    assert quiet(table) == {"c": 3}


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
        ({"sources": ("plan.py",)}, "sources"),
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


def test_the_stamp_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PACKAGE", tmp_path)
    (tmp_path / "kernel.py").write_text("x = 1")
    before = store.source_hash(("kernel.py",))
    assert before == store.source_hash(("kernel.py",))
    (tmp_path / "kernel.py").write_text("x = 2")
    assert before != store.source_hash(("kernel.py",))


# Where there is no place for them


def test_a_folder_that_cannot_be_written(table: store.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(store.ENVIRONMENT, str(tmp_path / "file" / "cache"))
    assert quiet(table) == {}
    for write in (table.check_writable, lambda: table.update({"a": 1})):
        with pytest.raises(
            RuntimeError, match=rf"tuned table .*{table.path.name} cannot be written.*{store.ENVIRONMENT}"
        ):
            write()


def test_a_write_that_fails_leaves_the_table_as_it_was(table: store.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    table.update({"a": 1})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(RuntimeError, match="disk full"):
        table.update({"b": 2})
    assert quiet(table) == {"a": 1}


def test_no_home_is_no_problem_for_reading(table: store.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (store.ENVIRONMENT, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    assert quiet(table) == {}
    with pytest.raises(RuntimeError, match="home"):
        table.check_writable()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other customs")
def test_the_folder_follows_the_custom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(store.ENVIRONMENT, "/named")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert store.cache_dir() == Path("/named")
    monkeypatch.delenv(store.ENVIRONMENT)
    assert store.cache_dir() == Path("/xdg/dinat-triton")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/someone")
    assert store.cache_dir() == Path("/someone/.cache/dinat-triton")


# Keys


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


# The tiles of the CPU


@pytest.fixture
def tiles(table: store.Table) -> store.Table:
    tiled.forget_tiles()
    yield tiled.user_tiles()
    tiled.forget_tiles()


def test_a_tuned_tile_goes_before_the_model(tiles: store.Table) -> None:
    modelled = tiled.choose_tile(GEOMETRY, 2, 4)
    own = (5, 3)
    assert own != modelled
    tiles.update({f"{tiled.tile_key(GEOMETRY, torch.float32, torch.get_num_threads())}/8": list(own)})
    assert tiled.choose_tile(GEOMETRY, 2, 4) == modelled  # what was chosen stays until it is asked for anew
    tiled.forget_tiles()
    assert tiled.choose_tile(GEOMETRY, 2, 4) == tiled.choose_tile(GEOMETRY, 1, 4) == own
    for other in ((GEOMETRY, 64, 4), (GEOMETRY, 2, 4, torch.bfloat16), (GEOMETRY, 2, 4, torch.float32, "mps")):
        assert tiled.choose_tile(*other) == tiled.modelled_tiles(*other[:3])[0]
    query, key, value = torch.randn(3, 1, 24, 24, 4, 8)
    args = ([7, 7, 1, 1, 1, 1, 0, 0], None, None, 0.0, False)
    tuned_out, reference = (torch.ops.dinat_triton.na([query, key, value], *args, x)[0] for x in ("tiled", "reference"))
    torch.testing.assert_close(tuned_out, reference)


def test_threads_have_tiles_of_their_own(tiles: store.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles.update({f"{tiled.tile_key(GEOMETRY, torch.float32, 3)}/8": [5, 3]})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert tiled.choose_tile(GEOMETRY, 2, 4) == (5, 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert tiled.choose_tile(GEOMETRY, 2, 4) == tiled.modelled_tiles(GEOMETRY, 2, 4)[0]


@pytest.mark.parametrize(
    "entry", [3, [], [0, 1], [1.5, 1], "4x4", [True, True], None, [4], [4, 4, 4], [4, 25], [4, 10**400]]
)
def test_what_is_no_tile_is_refused(entry: Any) -> None:
    with pytest.raises(ValueError, match="a tile for float32/1/24x24-k7x7-d1x1/8"):
        tiled.tile_of("float32/1/24x24-k7x7-d1x1/8", entry)


def test_a_table_is_read_once(tiles: store.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles.update({f"{tiled.tile_key(GEOMETRY, torch.float32, torch.get_num_threads())}/8": [5, 3]})
    reads = []
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, **options: reads.append(self) or read(self, **options))
    for maps in range(1, 30):
        tiled.choose_tile(GEOMETRY, 1, maps)
    assert [path.name for path in reads] == [tiles.path.name]


def test_importing_reads_no_table(table: store.Table) -> None:
    code = (
        "import sys\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        "import dinat_triton, dinat_triton.kernels.attention\n"
        "print([path for path in opened if path.endswith('.json') and 'tuned' in path or 'cpuinfo' in path])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
