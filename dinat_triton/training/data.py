"""Images to train and validate on, from timm's data sets: in an order and with a chance that a resume repeats."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_dataset, create_loader, resolve_data_config
from timm.utils import random_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinat_triton.training import shards
from dinat_triton.training.recipe import Recipe

NAMED = ("hfds/", "torch/")  # DATA that is a name for timm, not a path
SHARDS = "wds/"  # before a folder of shards
STREAMS = ("hfids/", "tfds/")


def seed_from(*numbers: int) -> int:
    """A seed that depends on all of the numbers, and is unlike that of any others."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Keeps so many bits of each colour. Of none is left black, as before Pillow 13, which refuses what timm draws."""
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep else image.point(lambda _: 0)


auto_augment.NAME_TO_OP |= dict.fromkeys(("Posterize", "PosterizeIncreasing"), posterize)


class Samples(Dataset):
    """Images of a timm data set. Augmentation depends on seed, epoch and index alone, whichever process loads them.

    Args:
        images: Pairs of image and label.
        recipe: Its seed and `max_broken`.
        training: Whether the next image takes the place of a broken one; else a blank one does, with the label -1.
        indices: Of the images to take; all by default.
    """

    def __init__(self, images: Any, recipe: Recipe, training: bool, indices: Sequence[int] | None = None):
        images._max_retries = 1  # else timm replaces broken images by others, uncounted
        self.images, self.training = images, training
        self.indices = range(len(images)) if indices is None else indices
        self.seed, self.max_broken = recipe.seed, recipe.max_broken
        self.transform: Any = None  # set by timm's create_loader
        # Shared with the processes that load. A byte for each image, so that they need no lock.
        self.broken = torch.zeros(len(self), dtype=torch.uint8).share_memory_()
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        seed = seed_from(self.seed, int(self.epoch), index)
        random_seed(seed, rank=0)
        for each in range(index, index + (self.max_broken + 1 if self.training else 1)):
            if (sample := self._read(each % len(self))) is not None:
                return sample
        if self.training:
            self.check()
        return self.transform(Image.new("RGB", (64, 64))), -1

    def _read(self, index: int) -> tuple[Tensor, int] | None:
        try:
            image, label = self.images[self.indices[index]]
        except Exception:  # Pillow's are of a dozen kinds
            self.broken[index] = 1
            return None
        return self.transform(image), int(label)

    def check(self) -> None:
        """Refuses to go on where more images are broken than may be."""
        broken = self.broken.nonzero()[:, 0].tolist()
        if len(broken) > self.max_broken:
            raise ValueError(
                f"{len(broken)} images cannot be read, more than --max-broken {self.max_broken}, such as "
                f"{self.name(broken[0])}"
            )

    def name(self, index: int) -> str:
        """An image's file, where it has one."""
        if not hasattr(self.images, "filename"):
            return f"number {self.indices[index]}"
        return str(self.images.filename(self.indices[index], absolute=True))


def open_split(recipe: Recipe, training: bool, class_map: Any = None) -> Any:
    """One of the splits, as a data set of timm."""
    data, split = recipe.data, recipe.train_split if training else recipe.val_split
    if data == "digits":
        from dinat_triton.training.digits import digits

        return digits(validation=not training)
    if data.startswith(STREAMS):
        raise ValueError(
            f"DATA cannot be a stream, which has no place to resume from, got {data!r}: use hfds/, wds/ or a folder"
        )
    if data.startswith(SHARDS):
        return open_shards(data.removeprefix(SHARDS), split)
    if data.startswith(NAMED):
        return create_dataset(data, root=recipe.data_dir, split=split)
    if not Path(data).exists():
        raise ValueError(
            f"DATA must be a folder or .tar of images, wds/, hfds/ or torch/ and a name, or digits, got {data!r}"
        )
    if Path(data).is_file() and Path(data).suffix != ".tar":
        raise ValueError(f"DATA must be a folder or a .tar where it is a path, got the file {data!r}")
    return create_dataset("", root=data, split=split, class_map=class_map)


def open_shards(folder: str, split: str) -> shards.Shards:
    """The images of a split of a WebDataset on disk."""
    if not Path(folder).is_dir():
        raise ValueError(f"DATA must be wds/ and a folder of .tar shards, got wds/{folder}: there is no such folder")
    paths = shards.find(folder, split)
    if not paths:
        names = ", ".join(path.name for path in sorted(Path(folder).glob("*.tar"))[:3]) or "none"
        raise ValueError(f"wds/{folder} has no shards of the split {split!r}: it holds {names}")
    try:
        images = shards.Shards(paths)
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"a shard of wds/{folder} cannot be read: {error}") from error
    if not len(images):
        raise ValueError(f"wds/{folder} has no KEY.jpg, .png or .webp with a KEY.cls beside it in {paths[0].name}")
    return images


def load_validation(recipe: Recipe) -> tuple[Samples, list[str]]:
    """All images of the split to validate on, and their classes."""
    images = open_split(recipe, training=False)
    return Samples(images, recipe, training=False), class_names(images, recipe)


def load(recipe: Recipe) -> tuple[Samples, Samples, list[str]]:
    """Images to train on, others to validate on, and the names of their classes."""
    images = open_split(recipe, training=True)
    classes = class_names(images, recipe)
    if len(classes) < 2:
        raise ValueError(f"{recipe.data} has images of {len(classes)} class, and nothing to tell apart")
    if _has_splits(recipe):
        others = open_split(recipe, training=False, class_map={name: i for i, name in enumerate(classes)})
        return Samples(images, recipe, True), Samples(others, recipe, False), classes
    order = np.random.RandomState(recipe.seed).permutation(len(images)).tolist()
    held_out = round(recipe.holdout * len(images))
    if not 0 < held_out < len(images):
        raise ValueError(f"{recipe.data} has {len(images)} images, too few to hold out {recipe.holdout} of them")
    others = open_split(recipe, training=True)
    return (
        Samples(images, recipe, True, order[held_out:]),
        Samples(others, recipe, False, sorted(order[:held_out])),
        classes,
    )


def _has_splits(recipe: Recipe) -> bool:
    """Whether other images are there to validate on; timm takes the same ones where a folder has no splits."""
    path = Path(recipe.data)
    if recipe.data.startswith(SHARDS):
        return bool(shards.find(recipe.data.removeprefix(SHARDS), recipe.val_split))
    if recipe.data == "digits" or recipe.data.startswith(NAMED):
        return True
    return path.is_dir() and any((path / name).is_dir() for name in {recipe.val_split}.union(*shards.SPLITS))


def class_names(images: Any, recipe: Recipe) -> list[str]:
    """The classes of a data set by their labels."""
    reader = getattr(images, "reader", images)
    mapping = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)  # a tar's
    if mapping:
        return sorted(mapping, key=mapping.__getitem__)
    raise ValueError(f"{recipe.data} does not say which classes it has")


def data_config(recipe: Recipe, model: nn.Module) -> dict[str, Any]:
    """Size, crop and normalization, of the recipe or else the model."""
    return resolve_data_config(asdict(recipe), model=model)


def train_loader(samples: Samples, recipe: Recipe, config: Mapping[str, Any], batch_size: int) -> DataLoader:
    """Batches for all processes together, augmented."""
    options: Any = dict(
        no_aug=recipe.no_aug, re_prob=recipe.reprob, re_mode="pixel", scale=recipe.scale, ratio=recipe.ratio,
        hflip=recipe.hflip, vflip=recipe.vflip, color_jitter=recipe.color_jitter, auto_augment=recipe.aa,
        interpolation=config["interpolation"] if recipe.no_aug else recipe.train_interpolation,
    )  # fmt: skip
    return _loader(samples, recipe, config, batch_size, is_training=True, **options)


def validation_loader(samples: Samples, recipe: Recipe, config: Mapping[str, Any], batch_size: int) -> DataLoader:
    """Batches for all processes together, in the order of the images."""
    cut = {name: config[name] for name in ("crop_pct", "crop_mode", "interpolation")}
    return _loader(samples, recipe, config, batch_size, **cut)


def _loader(samples: Any, recipe: Recipe, config: Mapping[str, Any], batch_size: int, **options: Any) -> DataLoader:
    return create_loader(
        samples, config["input_size"], batch_size, mean=config["mean"], std=config["std"], num_workers=recipe.workers,
        use_prefetcher=False, pin_memory=torch.cuda.is_available(), **options,
    )  # fmt: skip


def check_batch(batch: int, images: int, processes: int, recipe: Recipe) -> None:
    """Refuses a batch that there are too few images for, or that cannot be shared."""
    if batch > images:
        raise ValueError(
            f"a step takes {batch} images over {processes} processes, and there are only {images} to learn from"
        )
    if batch % processes:
        raise ValueError(f"the run's steps of {batch} images cannot be shared by {processes} processes")
    if (recipe.mixup or recipe.cutmix) and batch // processes % 2:
        raise ValueError(
            f"mixup and cutmix take pairs: {batch // processes} images of a process must be an even number"
        )
