"""Recipes: everything that decides what a run computes, by default, by YAML file and by option."""

# ruff: noqa: RUF009  (`_of` makes a field, as `field` does)

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any

import yaml

from dinat_triton.files import replacing

FOLDER = Path(__file__).with_name("recipes")


def _of(kind: Callable[[Any], Any], default: Any, text: str, **facts: Any) -> Any:
    """A field: what turns words into its values, its default, its help, and its bounds and so on."""
    return field(default_factory=lambda: default, metadata={"kind": kind, "text": text, **facts})


@dataclass(frozen=True)
class Recipe:
    """Options of a run, named as in timm's train.py where it has them. A resume may change those that are `free`."""

    data: str = _of(
        str, "digits", "a folder or .tar of images, wds/FOLDER of shards, timm's hfds/... or torch/..., or digits"
    )
    data_dir: str | None = _of(str, None, "root folder of a data set that DATA names")
    train_split: str = _of(str, "train", "name of the split to learn from")
    val_split: str = _of(str, "validation", "name of the split to validate on")
    holdout: float = _of(
        float, 0.2, "share of a folder without splits that is held out to validate on", low=0.001, high=0.9
    )
    max_broken: int = _of(int, 10, "images that may be unreadable, and are skipped", low=0, free=True)
    workers: int = _of(int, 4, "processes that load images, for each that trains", low=0, free=True)

    model: str = _of(str, "dinat_mini", "any model of timm")
    model_kwargs: dict[str, Any] = _of(dict, {}, "arguments of the model, such as dilations=auto img_size=512")
    weights: str = _of(str, "random", "a checkpoint in any layout, 'hub' or 'random', to start from")
    drop_path: float | None = _of(float, None, "stochastic depth (default: that of the variant)", low=0, high=1)
    freeze: int = _of(
        int, 0, "stages that do not learn: 1 is the patch embedding, 2 the first level with it, ...", low=0
    )
    grad_checkpointing: bool = _of(bool, False, "recompute activations in the backward to save memory")
    channels_last: bool = _of(bool, False, "keep images channels last")
    torchcompile: bool = _of(bool, False, "compile the model")
    amp: bool = _of(bool, False, "compute in --amp-dtype where that is safe")
    amp_dtype: str = _of(str, "bfloat16", "of --amp", choices=("bfloat16", "float16"))
    fsdp: bool = _of(bool, False, "shard weights, gradients and optimizer over the processes (FSDP2)", free=True)
    device: str | None = _of(
        str, None, "cpu, cuda or mps (default: the fastest here)", choices=("cpu", "cuda", "mps"), free=True
    )

    epochs: int = _of(int, 300, "passes over the images, without the cooldown", low=1)
    batch_size: int = _of(int, 128, "images a process takes at a time", low=1)
    grad_accum_steps: int = _of(int, 1, "times that many make a step", low=1)
    seed: int = _of(int, 42, "of weights, order, augmentation and dropout", low=0)

    opt: str = _of(str, "adamw", "any optimizer of timm")
    opt_kwargs: dict[str, Any] = _of(dict, {}, "its further arguments, such as eps=1e-6")
    lr: float | None = _of(float, None, "highest learning rate (default: from --lr-base)", low=0)
    lr_base: float = _of(float, 1e-3, "the same at a step of --lr-base-size images; others in proportion", low=0)
    lr_base_size: int = _of(int, 1024, "images that --lr-base is for", low=1)
    weight_decay: float = _of(float, 0.05, "of all but biases, norms and relative positional biases", low=0)
    layer_decay: float | None = _of(
        float, None, "factor of the learning rate from each block to the one before", low=0, high=1
    )
    clip_grad: float | None = _of(float, None, "norm that gradients are clipped to", low=0)
    sched: str = _of(str, "cosine", "any schedule of timm; poly with --decay-rate 1 is linear")
    decay_rate: float = _of(float, 0.1, "of the schedules that have one", low=0)
    warmup_epochs: int = _of(int, 0, "in which the learning rate rises", low=0)
    warmup_lr: float = _of(float, 1e-6, "learning rate of the first step, with a warmup", low=0)
    min_lr: float = _of(float, 0.0, "learning rate of the end", low=0)
    cooldown_epochs: int = _of(int, 0, "further epochs at --min-lr", low=0)

    img_size: int | None = _of(int, None, "side of the images (default: that of the model)", low=1)
    mean: list[float] | None = _of(float, None, "of the images' channels (default: the model's)", many=True)
    std: list[float] | None = _of(float, None, "of the images' channels (default: the model's)", many=True)
    interpolation: str | None = _of(str, None, "of resizing to validate (default: the model's)")
    crop_pct: float | None = _of(
        float, None, "share of an image's side that is validated (default: the model's)", low=0.01, high=1
    )
    crop_mode: str | None = _of(str, None, "how images to validate are cut", choices=("center", "squash", "border"))
    no_aug: bool = _of(bool, False, "resize and cut training images without chance")
    train_interpolation: str = _of(str, "random", "of resizing to train")
    scale: list[float] = _of(float, [0.08, 1.0], "range of the area that a random crop takes", many=True)
    ratio: list[float] = _of(float, [0.75, 4 / 3], "range of its aspect", many=True)
    hflip: float = _of(float, 0.5, "probability of a horizontal flip", low=0, high=1)
    vflip: float = _of(float, 0.0, "probability of a vertical flip", low=0, high=1)
    color_jitter: float = _of(float, 0.4, "strength, where --aa does not replace it", low=0)
    aa: str | None = _of(str, None, "AutoAugment or RandAugment, such as rand-m9-mstd0.5-inc1")
    reprob: float = _of(float, 0.0, "probability of random erasing", low=0, high=1)
    smoothing: float = _of(float, 0.0, "of the labels", low=0, high=0.999)
    mixup: float = _of(float, 0.0, "alpha of mixup", low=0)
    cutmix: float = _of(float, 0.0, "alpha of cutmix", low=0)
    mixup_prob: float = _of(float, 1.0, "probability of either, where there is one", low=0, high=1)
    mixup_switch_prob: float = _of(float, 0.5, "probability of cutmix, where there are both", low=0, high=1)
    mixup_off_epoch: int = _of(int, 0, "epoch from which neither is used, or 0", low=0)

    model_ema: bool = _of(bool, False, "average the weights; the averages are validated and written")
    model_ema_decay: float = _of(float, 0.9998, "of the averages", low=0, high=1)
    model_ema_warmup: bool = _of(bool, False, "let the averages forget faster at first")

    checkpoint_minutes: float = _of(
        float, 10.0, "between checkpoints, besides those after each epoch", low=0, free=True
    )
    checkpoint_hist: int = _of(int, 2, "checkpoints to keep", low=1, free=True)
    log_with: list[str] | None = _of(str, None, "trackers: tensorboard, wandb, ...", many=True, free=True)

    def __post_init__(self) -> None:
        for each in fields(self):
            _check(each.name, getattr(self, each.name), each.metadata)
        if len(self.scale) != 2 or len(self.ratio) != 2:
            raise ValueError(f"scale and ratio must be two numbers each, got {self.scale} and {self.ratio}")


FIELDS = {each.name: each.metadata for each in fields(Recipe)}


def _check(name: str, value: Any, facts: Mapping[str, Any]) -> None:
    low, high, choices = facts.get("low", -inf), facts.get("high", inf), facts.get("choices")
    if value is None:
        return
    if choices and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if facts["kind"] in (int, float) and not facts.get("many") and not low <= value <= high:
        bound = f"at least {low}" if high == inf else f"between {low} and {high}"
        raise ValueError(f"{name} must be {bound}, got {value}")


def read(name: str) -> dict[str, Any]:
    """Reads what a recipe sets: one of ours by its name, or a YAML file such as a run's args.yaml."""
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        raise ValueError(f"recipe must be a YAML file or one of {', '.join(names())}, got {name!r}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"recipe {path} must map options to values")
    return {key: _converted(str(key), value, str(path)) for key, value in content.items()}


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _converted(key: str, value: Any, where: str) -> Any:
    """A value of a YAML file as its option takes it. (YAML takes 1e-3 for a word.)"""
    if key not in FIELDS:
        close = difflib.get_close_matches(key, FIELDS, n=1)
        raise ValueError(
            f"recipe {where} has an unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else "")
        )
    kind, many = FIELDS[key]["kind"], FIELDS[key].get("many", False)
    values = value if many and isinstance(value, list) else [value]
    try:
        if value is None:
            return None
        if kind in (bool, dict) and not isinstance(value, kind):
            raise TypeError
        converted = [kind(each) for each in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"recipe {where}: {key} must be {kind.__name__}, got {value!r}") from error
    return converted if many else converted[0]


def add_options(parser: argparse._ActionsContainer, names: Sequence[str]) -> None:
    """Adds options of a recipe. Those that are not given leave no trace, so that they do not override one."""
    from timm.utils import ParseKwargs

    for name in names:
        facts = FIELDS[name]
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": facts["text"].replace("%", "%%")}
        if facts["kind"] is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif facts["kind"] is dict:
            options |= {"nargs": "+", "action": ParseKwargs, "metavar": "NAME=VALUE"}
        else:
            options |= {"type": facts["kind"], "metavar": facts["kind"].__name__.upper()}
            options |= {"nargs": "+"} if facts.get("many") else {}
        parser.add_argument(f"--{name.replace('_', '-')}", **options)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a recipe that a command line holds."""
    return {name: value for name, value in vars(args).items() if name in FIELDS}


def report(sets: Mapping[str, Any], overrides: Mapping[str, Any], name: str) -> str:
    """Lists what a recipe sets, and what of it the command line overrides."""
    lines = [f"recipe {name}: " + ", ".join(f"{k} {v}" for k, v in sets.items() if k not in overrides)]
    changed = [f"{k} {v}" + (f" (recipe: {sets[k]})" if sets.get(k, v) != v else "") for k, v in overrides.items()]
    return "\n".join(lines + ([f"overridden: {', '.join(changed)}"] if changed else []))


def dump(recipe: Recipe) -> str:
    return yaml.safe_dump(asdict(recipe), sort_keys=False)


def save(recipe: Recipe, path: Path) -> None:
    with replacing(path) as beside:
        beside.write_text(dump(recipe), encoding="utf-8")


def check_same(recipe: Recipe, path: Path) -> None:
    """Refuses to resume a run with other options than it has, but for those that are free."""
    before, now = yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(dump(recipe))
    changed = [
        f"--{key.replace('_', '-')} was {before.get(key)!r} and is now {now[key]!r}"
        for key in now
        if now[key] != before.get(key) and not FIELDS[key].get("free")
    ]
    if changed:
        raise ValueError(f"{path.parent} cannot be resumed with other options: {'; '.join(changed)}")
