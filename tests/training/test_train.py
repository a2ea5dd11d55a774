"""`dinat-triton train`: what it writes, what it starts from and what it refuses."""

import csv
import io
import shutil
import tarfile
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from timm.data import auto_augment

from dinat_triton.bench.runtimes import RUNTIMES
from dinat_triton.cli import main
from dinat_triton.commands.inputs import picture
from dinat_triton.training import beat, checkpoint, data, recipe, shards
from dinat_triton.training.engine import Engine
from dinat_triton.training.model import build

from .conftest import SMALL


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dinat-triton")]
    assert len(lines) == 1
    return lines[0]


def test_a_run_leaves_weights_metrics_and_a_curve_is_reproduced_and_not_mixed_with_another(
    train, tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    assert train(run, "--checkpoint-hist 2") == 0
    printed = capsys.readouterr()
    assert "epochs 3 (recipe: 300)" in printed.out
    assert printed.err == ""  # no bar outside a terminal
    assert Image.open(run / "curve.png").size[0] > 400
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["9", "18", "27"]
    best = max(rows, key=lambda row: float(row["top1"]))
    assert f"best: {float(best['top1']):.2f} % top-1 in epoch {best['epoch']}" in printed.out
    assert len(list((run / "checkpoints").iterdir())) == 2
    again = ["--recipe", str(run / "args.yaml"), "--out", str(tmp_path / "again"), "--workers", "2"]
    assert main(["train", *again]) == 0
    weights, again = (load_file(tmp_path / name / "last.safetensors") for name in ("run", "again"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
    capsys.readouterr()
    assert train(run) == 2
    assert f"{run} holds a run: --resume auto goes on with it, or name another --out" in error_of(capsys)
    assert train(run, "--checkpoint-hist 2 --epochs 4 --resume auto --lr 0.5 --workers 1") == 2
    said = error_of(capsys)
    assert "--epochs was 3 and is now 4; --lr was 0.001 and is now 0.5" in said
    assert "workers" not in said


def test_fine_tuning_starts_from_weights_with_another_head_and_leaves_frozen_stages(train, tmp_path: Path) -> None:
    args = dict(embed_dim=32, depths=(1, 1), kernel_size=3, num_classes=7)
    before = timm.create_model("dinat_mini", **args).state_dict()
    torch.save(before, tmp_path / "seven.pth")
    assert train(tmp_path / "run", f"--weights {tmp_path / 'seven.pth'} --freeze 2 --epochs 1") == 0
    after = load_file(tmp_path / "run" / "last.safetensors")
    assert after["head.fc.weight"].shape == (3, 64)
    same = {key for key, tensor in before.items() if torch.equal(after[key], tensor)}
    frozen = {key for key in before if key.startswith(("patch_embed", "levels.0"))}
    assert frozen <= same
    assert not [key for key in same - frozen if key.endswith("weight")]


def test_options_reach_what_they_are_for(train, tmp_path: Path, monkeypatch) -> None:
    engines, seen = [], []

    def step(self: Engine, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        engines.append(self)
        seen.append(set(images.sum((1, 2, 3)).tolist()))
        return torch.zeros(())

    monkeypatch.setattr(Engine, "step", step)
    monkeypatch.setattr(Engine, "state", lambda self: {"done": self.done, "model": {}})
    options = "--lr 0.1 --warmup-epochs 2 --warmup-lr 0.01 --weight-decay 0.3 --layer-decay 0.5 --cutmix 0 --mixup 0.5"
    train(tmp_path, f"{options} --smoothing 0.2 --model-ema --amp --opt-kwargs eps=1e-3 --epochs 3 --sched constant")
    assert not set.union(*seen[:9]) & set.union(*seen[9:18])  # each epoch augments anew
    engine, named = engines[0], dict(engines[0].model.named_parameters())
    groups = {id(p): group for group in engine.optimizer.param_groups for p in group["params"]}
    assert groups[id(named["levels.0.blocks.0.attn.rpb"])]["weight_decay"] == 0
    assert groups[id(named["levels.0.blocks.0.attn.qkv.weight"])]["weight_decay"] == 0.3
    scales = [groups[id(named[f"levels.{i}.blocks.0.mlp.fc1.weight"])]["lr_scale"] for i in (0, 1)]
    assert scales[1] == pytest.approx(2 * scales[0])
    assert engine.lr == pytest.approx(0.01)
    engine.schedule.step_update(18)
    assert engine.lr == pytest.approx(0.1)
    assert engine.optimizer.param_groups[0]["eps"] == 1e-3
    assert (engine.mixup.mixup_alpha, engine.mixup.label_smoothing) == (0.5, 0.2)
    assert engine.result is engine.averages.module
    assert engine.accelerator.mixed_precision == "bf16"


@pytest.mark.parametrize(
    ("minutes", "says", "good"),
    [(10, "the loss is nan after step 13", 9), (0, "weights are no numbers after step 12", 11)],
)
def test_what_is_no_number_stops_the_run_and_names_the_last_good_checkpoint(
    minutes: int, says: str, good: int, train, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(beat, "SECONDS", 0.0)
    step = Engine.step

    def diverge(self: Engine, *batch: torch.Tensor) -> torch.Tensor:
        loss = step(self, *batch)
        if self.done == 12:
            self.model.norm.bias.data.fill_(torch.nan)
        return loss

    monkeypatch.setattr(Engine, "step", diverge)
    assert train(tmp_path, f"--checkpoint-minutes {minutes}") == 2
    path = checkpoint.latest(tmp_path)
    assert path.name == f"step-{good:09}.pt"
    assert f"{says}: the last good checkpoint is {path}" in error_of(capsys)


def test_broken_images_are_left_out_and_counted(train, pictures: Path, tmp_path: Path, capsys) -> None:
    data = tmp_path / "pictures"
    shutil.copytree(pictures, data / "train")
    shutil.copytree(pictures, data / "val")
    for split in ("train", "val"):
        (data / split / "red" / "03.png").write_bytes(b"no image")
    assert train(tmp_path / "run", "--max-broken 1 --epochs 1 --workers 1", data) == 0
    assert "48 images of 3 classes to learn, 48 to validate" in capsys.readouterr().out
    words = f"validate {data} --trained {tmp_path / 'run'} --per-class {tmp_path / 'a.csv'}"
    assert main(words.split()) == 0
    assert "on 47 images" in capsys.readouterr().out
    assert "red,15," in (tmp_path / "a.csv").read_text()
    assert train(tmp_path / "other", "--max-broken 0 --epochs 1", data) == 2
    assert "1 images cannot be read, more than --max-broken 0, such as" in error_of(capsys)


def test_shards_are_images_in_any_order(train, pictures: Path, tmp_path: Path, capsys) -> None:
    files = [sorted(pictures.glob("*/*.png"))[i] for i in torch.randperm(48)]
    classes = ["blue", "green", "red"]
    for number, split in enumerate(("train", "train", "train", "val")):
        with tarfile.open(tmp_path / f"pictures-{split}-{number}.tar", "w") as shard:
            for key, path in enumerate(files[number * 12 : number * 12 + 12]):
                label = str(classes.index(path.parent.name)).encode()
                for ending, data in (("json", b"{}"), ("cls", label), ("png", path.read_bytes())):
                    member = tarfile.TarInfo(f"a/{key:04}.{ending}")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))
    images = shards.Shards(shards.find(str(tmp_path), "train"))
    for index in torch.randperm(36).tolist():
        image, label = images[index]
        assert image.tobytes() == picture(files[index]).tobytes()
        assert label == classes.index(files[index].parent.name)
    assert train(tmp_path / "run", "--epochs 1 --workers 1", f"wds/{tmp_path}") == 0
    assert "36 images of 3 classes to learn, 12 to validate" in capsys.readouterr().out
    assert train(tmp_path / "other", "--train-split test", f"wds/{tmp_path}") == 2
    assert "has no shards of the split 'test': it holds pictures-train-0.tar" in error_of(capsys)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--batch-size 400", "a step takes 400 images over 1 processes, and there are only 38 to learn from"),
        ("--epochs 0", "epochs must be at least 1, got 0"),
        ("--device cuda", "--device cuda cannot be used"),
        ("--model nonsense", "no model 'nonsense'"),
        ("--aa nonsense", "refused by timm"),
        ("--mixup 1 --batch-size 3", "must be an even number"),
        ("--freeze 9", "--freeze must leave something to learn"),
        ("--weights {other}", "does not fit this model"),
        ("--recipe nonsense", "recipe must be a YAML file or one of digits, finetune, imagenet, imagenet_384"),
        ("--recipe {typo}", "has an unknown key 'warmup_epoch'; did you mean 'warmup_epochs'?"),
        ("--recipe {words}", "epochs must be int, got 'many'"),
        ("--resume {other}", "is no checkpoint of a run, or damaged"),
        ("--log-with nonsense", "--log-with nonsense is not installed"),
        ("{nothing}", "DATA must be a folder or .tar of images"),
        ("tfds/images", "DATA cannot be a stream"),
        ("wds/images", "there is no such folder"),
        ("{empty}", "Found 0 images"),
        ("{single}", "has images of 1 class, and nothing to tell apart"),
    ],
)
def test_bad_input_is_refused(options: str, says: str, pictures: Path, tmp_path: Path, capsys) -> None:
    paths = {name: tmp_path / name for name in ("other", "typo", "words", "empty", "nothing", "single")}
    torch.save(timm.create_model("dinat_mini", embed_dim=32, depths=(2, 1), kernel_size=3).state_dict(), paths["other"])
    paths["typo"].write_text("warmup_epoch: 3")
    paths["words"].write_text("epochs: many")
    paths["empty"].mkdir()
    shutil.copytree(pictures / "red", paths["single"] / "red")
    words = options.format(**paths).split()
    data = [] if not words[0].startswith("--") else [str(pictures)]
    assert main(["train", *data, *SMALL.split(), "--out", str(tmp_path / "run"), *words]) == 2
    assert says in error_of(capsys)
    assert not (tmp_path / "run").exists()


def test_augmentation_at_its_strongest_posterizes_to_black() -> None:
    augment = auto_augment.AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)
    assert augment(Image.new("RGB", (2, 2), "white")).getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_is_read_and_kept_whole(name: str, tmp_path: Path) -> None:
    before = recipe.Recipe(**recipe.read(name))
    recipe.save(before, tmp_path / "args.yaml")
    assert recipe.Recipe(**recipe.read(str(tmp_path / "args.yaml"))) == before
    assert set(yaml.safe_load((recipe.FOLDER / f"{name}.yaml").read_text())) <= set(recipe.FIELDS)


@pytest.mark.slow
def test_digits_reach_their_accuracy_in_all_numbers(tmp_path: Path) -> None:
    assert main(["train", "digits", "--out", str(tmp_path), "--workers", "1"]) == 0
    sets = recipe.read(str(tmp_path / "args.yaml")) | {"weights": str(tmp_path / "best.safetensors"), "workers": 0}
    options = recipe.Recipe(**sets)
    _, samples, classes = data.load(options)
    model = build(options, len(classes), new_classifier=False).eval()
    images, labels = next(
        iter(data.validation_loader(samples, options, data.data_config(options, model), len(samples)))
    )
    exact = model(images).argmax(1).eq(labels).float().mean()
    assert exact >= 0.97
    for runtime in ("onnx", "onnx-int8", "openvino-bfloat16", "bfloat16", "int8"):
        assert RUNTIMES[runtime](model, images)().argmax(1).eq(labels).float().mean() >= exact - 0.003, runtime
