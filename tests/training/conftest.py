"""A folder of pictures that a tiny model learns from within seconds, and runs on it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from dinat_triton.cli import main

MODEL = "embed_dim=32 depths=(1,1) kernel_size=3 dilations=auto img_size=16"
# Everything that draws random numbers, or keeps something from step to step.
EVERYTHING = (
    "--mixup 0.8 --cutmix 1 --smoothing 0.1 --aa rand-m9-mstd0.5-inc1 --reprob 0.5 --drop-path 0.3 --clip-grad 1 "
    "--grad-accum-steps 2 --model-ema --model-ema-decay 0.9 --layer-decay 0.8 --warmup-epochs 1 --mixup-off-epoch 2"
)
SMALL = (
    f"--model-kwargs {MODEL} --img-size 16 --batch-size 4 --epochs 3 --cooldown-epochs 0 --workers 0 --lr 1e-3 "
    "--device cpu"
)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 16 pictures, each mostly of one colour."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.RandomState(0)
    for channel, name in enumerate(("blue", "green", "red")):
        (folder / name).mkdir()
        for number in range(16):
            pixels = draw.randint(0, 150, (20, 24, 3))
            pixels[..., channel] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:02}.png")
    return folder


@pytest.fixture(autouse=True)
def _no_accelerator_left() -> Iterator[None]:
    """accelerate allows one per process, and tests are many runs in one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def train(pictures: Path) -> Callable[..., int]:
    """Trains on the pictures: `train(run, options)` returns the exit code."""

    def train(run: Path, options: str = "", data: object = pictures) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        return main(["train", str(data), "--out", str(run), *SMALL.split(), *options.split()])

    return train
