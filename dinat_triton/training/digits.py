"""scikit-learn's handwritten digits as a data set of timm: what is trained on where no data are named."""

from __future__ import annotations

import io
from typing import BinaryIO

import numpy as np
from timm.data import ImageDataset
from timm.data.readers.reader import Reader

HELD_OUT = 360  # of 1797 images
SCALE = 4  # 8 x 8 pixels, enlarged to images that the model's patches can cut


class DigitsReader(Reader):
    """The digits as files, as timm's readers give images."""

    def __init__(self, validation: bool):
        from PIL import Image

        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
        super().__init__()
        images, self.labels = load_digits(return_X_y=True)
        order = np.random.RandomState(0).permutation(len(images))
        chosen = order[:HELD_OUT] if validation else order[HELD_OUT:]
        self.labels = self.labels[chosen]
        self.class_to_idx = {str(digit): digit for digit in range(10)}
        self.files = []
        for pixels in images[chosen].reshape(-1, 8, 8):
            image = Image.fromarray((pixels * 15.9375).astype(np.uint8)).resize(
                (8 * SCALE, 8 * SCALE), Image.Resampling.BILINEAR
            )
            file = io.BytesIO()
            image.save(file, "png")
            self.files.append(file.getvalue())

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return io.BytesIO(self.files[index]), int(self.labels[index])

    def __len__(self) -> int:
        return len(self.files)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f"digit {index}"


def digits(validation: bool) -> ImageDataset:
    return ImageDataset("", reader=DigitsReader(validation))
