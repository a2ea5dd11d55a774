"""Images in the tar shards of a WebDataset, read by their place: any order, and a run that resumes anywhere."""

from __future__ import annotations

import io
import tarfile
from array import array
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from PIL import Image

IMAGES = ("jpg", "jpeg", "png", "webp")
SPLITS = ({"train", "training"}, {"val", "valid", "validation", "eval", "evaluation"})  # words for the same


class Shards:
    """The images of some shards and their labels, which lie beside them as `KEY.cls`.

    Opening it reads the headers of all shards: about a minute and a half for a million images.
    """

    def __init__(self, paths: list[Path]):
        self.paths = paths
        # Plain numbers, since processes that load get a copy of all of them.
        self.shard, self.start, self.size, self.labels = array("l"), array("q"), array("q"), array("l")
        for number, path in enumerate(paths):
            for image, label in _samples(path):
                self.shard.append(number)
                self.start.append(image.offset_data)
                self.size.append(image.size)
                self.labels.append(label)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with self.paths[self.shard[index]].open("rb") as file:
            file.seek(self.start[index])
            image = Image.open(io.BytesIO(file.read(self.size[index])))
        return image.convert("RGB"), self.labels[index]

    def filename(self, index: int, **_: object) -> str:
        """The shard of an image, and its place there."""
        return f"{self.paths[self.shard[index]]} from byte {self.start[index]}"

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Classes have numbers for names: shards say no more of them."""
        return {str(label): label for label in range(max(self.labels, default=-1) + 1)}


def find(folder: str, split: str) -> list[Path]:
    """The shards of a split in a folder: those named after it, as `imagenet-train-0001.tar` is, or after a pattern."""
    words = next((each for each in SPLITS if split in each), {split})
    shards = sorted(Path(folder).glob("*.tar"))
    return [path for path in shards if fnmatch(path.name, split) or words & {*path.stem.split("-")}]


def _samples(path: Path) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Images with their labels. Files of one sample follow each other, and have all but their endings in common."""
    key, image, label = "", None, None
    with tarfile.open(path) as shard:
        for member in shard:
            folder, _, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            if f"{folder}/{stem}" != key:
                key, image, label = f"{folder}/{stem}", None, None
            if ending.lower() in IMAGES:
                image = member
            elif ending == "cls" and (file := shard.extractfile(member)):
                label = int(file.read())
            else:
                continue
            if image is not None and label is not None:
                yield image, label
