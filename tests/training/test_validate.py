"""`dinat-triton validate`: against counting by hand, on one process and on two."""

import os
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import timm
import torch
from timm.data import create_transform

from dinat_triton.cli import main
from dinat_triton.commands.inputs import picture
from dinat_triton.models.checkpoints import save_state_dict
from tests.processes import in_processes

from .conftest import MODEL

ARGS = dict(embed_dim=32, depths=(1, 1), kernel_size=3, dilations="auto", img_size=16, num_classes=3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_state_dict(timm.create_model("dinat_mini", weight_init="skip", **ARGS).state_dict(), path)
    return path


def command(pictures: Path, weights: Path, *options: str) -> list[str]:
    words = f"validate {pictures} --weights {weights} --model-kwargs {MODEL} --img-size 16 --workers 0 --device cpu"
    return [*words.split(), *options]


@pytest.mark.parametrize("crop", ["center", "squash"])
def test_it_counts_what_is_right(crop: str, pictures: Path, weights: Path, tmp_path: Path, capsys) -> None:
    table = tmp_path / "classes.csv"
    assert main(command(pictures, weights, "--crop", crop, "--batch-size", "7", "--per-class", str(table))) == 0
    model = timm.create_model("dinat_mini", checkpoint_path=str(weights), **ARGS).eval()
    transform = create_transform(16, crop_pct=0.875, crop_mode=crop, interpolation="bicubic")
    files = sorted(pictures.glob("*/*.png"))
    labels = torch.arange(3).repeat_interleave(16)
    with torch.no_grad():
        logits = model(torch.stack([transform(picture(file)) for file in files]))
    right = logits.argmax(-1) == labels
    loss = torch.nn.functional.cross_entropy(logits, labels)
    said = capsys.readouterr().out
    assert f"on 48 images: top-1 {100 * right.float().mean():.2f} %, top-5 100.00 %, loss {loss:.4f}" in said
    found = [f"{100 * part:.2f}" for part in right.float().unflatten(0, (3, 16)).mean(1)]
    by_class = [f"{name},16,{part}" for name, part in zip(("blue", "green", "red"), found, strict=True)]
    assert table.read_text().splitlines() == ["class,images,top1", *by_class]


def speak(words: list[str], out: Path) -> None:
    with open(out / f"{os.environ['RANK']}.txt", "w") as file, redirect_stdout(file):
        assert main(words) == 0


def test_two_processes_count_no_image_twice_and_only_one_speaks(pictures, weights, tmp_path: Path, capsys) -> None:
    in_processes(2, speak, command(pictures, weights, "--batch-size", "5"), tmp_path)
    assert main(command(pictures, weights)) == 0
    alone = re.search(r"on 48 images: .*?loss \S+", capsys.readouterr().out)[0]
    assert alone in (tmp_path / "0.txt").read_text()
    assert (tmp_path / "1.txt").read_text() == ""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--real-labels"], "--real-labels are of ImageNet's 50000 validation images, got 48 images"),
        (["--per-class", "table.txt"], "must end in .csv"),
        (["--weights", "{seven}"], "checkpoint has a classifier of 7 classes, the model one of 3"),
        (["--trained", "nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_refused(options: list[str], says: str, pictures: Path, weights: Path, tmp_path, capsys) -> None:
    torch.save(timm.create_model("dinat_mini", **ARGS | {"num_classes": 7}).state_dict(), tmp_path / "seven.pth")
    assert main(command(pictures, weights, *(option.format(seven=tmp_path / "seven.pth") for option in options))) == 2
    assert says in capsys.readouterr().err
