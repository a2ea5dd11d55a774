"""Files that commands write: whole or untouched, and never what was not to be touched."""

import multiprocessing
import os
import sys
from pathlib import Path

import matplotlib.font_manager  # noqa: F401 - whose own cache file must not meet the full disk
import pytest
import timm
import torch

from dinat_triton.cli import main
from dinat_triton.files import check_target, replacing
from dinat_triton.models.checkpoints import save_state_dict

SMALL = dict(embed_dim=32, depths=(1, 1, 1, 1), num_classes=10)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model.safetensors"
    save_state_dict(timm.create_model("dinat_mini", **SMALL).state_dict(), path)
    return path


def test_a_file_is_replaced_only_when_its_successor_is_whole(tmp_path: Path) -> None:
    path, link = tmp_path / "file.txt", tmp_path / "link.txt"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)

    def write_half() -> None:
        with replacing(link) as beside:
            beside.write_text("half")
            raise OSError(28, "No space left on device", str(beside))

    with pytest.raises(OSError, match=r"file.txt cannot be written: No space left"):
        write_half()
    assert path.read_text() == "old"
    (old := tmp_path / "old.txt").hardlink_to(path)  # whoever reads the old file meanwhile reads it to its end
    with replacing(link) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert link.is_symlink()
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o640)
    assert {each.name for each in tmp_path.iterdir()} == {"file.txt", "link.txt", "old.txt"}
    assert old.read_text() == "old"


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("there", {}, "there is there already: --force replaces it"),
        ("source", {"force": True}, "would overwrite the source"),
        ("hard", {"force": True}, "would overwrite the source"),
        ("soft", {"force": True}, "would overwrite the source"),
        ("folder", {"force": True}, "is there already, and is no file"),
        ("pipe", {"force": True}, "is there already, and is no file"),
        ("no/new", {}, "there is no folder"),
        ("there/new", {"folder": True}, "there is no folder"),
        ("new.gif", {"endings": (".png", ".pdf")}, "must end in .png or .pdf, got"),
    ],
)
def test_what_must_not_be_written_is_refused(name: str, options: dict, says: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for path in (source, tmp_path / "there"):
        path.touch()
    os.link(source, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(source)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=says):
        check_target(tmp_path / name, source=source, **options)
    check_target(tmp_path / "there", source=source, force=True)
    check_target(tmp_path / "no" / "new", folder=True)


def test_convert_never_replaces_its_source_or_anything_unasked(checkpoint: Path, tmp_path: Path, capsys) -> None:
    folder = checkpoint.parent
    assert main(["convert", str(checkpoint), str(folder), "--model", "dinat_mini", "--force"]) == 2
    assert "would overwrite the source" in capsys.readouterr().err
    (tmp_path / "b.pth").write_text("precious")
    assert main(["convert", str(checkpoint), str(tmp_path / "b.pth")]) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "b.pth").read_text() == "precious"
    assert main(["convert", str(checkpoint), str(tmp_path / "b.pth"), "--force"]) == 0
    assert len(torch.load(tmp_path / "b.pth")) == len(timm.create_model("dinat_mini", **SMALL).state_dict())
    for target, says in (("none/b.pth", "there is no folder"), ("b.npz", ".safetensors, .pth")):
        assert main(["convert", str(checkpoint), str(tmp_path / target)]) == 2
        assert says in capsys.readouterr().err


def on_a_full_disk(words: list[str]) -> None:
    import resource  # not on every system

    torch.set_num_threads(1)  # a fork has none of its parent's threads
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    sys.exit(main(words))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("convert {source} {target} --force", "a.pth"),
        ("convert {source} {target} --force", "a.safetensors"),
        ("plot neighborhood --shape 100 100 -o {target} --force", "a.svg"),
    ],
)
def test_a_full_disk_leaves_the_old_file_and_a_line(
    command: str, name: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / name
    target.write_text("old")
    words = command.format(source=checkpoint, target=target).split()
    process = multiprocessing.get_context("fork").Process(target=on_a_full_disk, args=(words,))
    process.start()
    process.join(120)
    out, error = capfd.readouterr()
    assert (process.exitcode, out, error.count("\n")) == (2, "", 1)
    assert f"{target} cannot be written" in error
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == [name]
