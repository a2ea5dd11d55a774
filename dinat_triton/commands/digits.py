"""`dinat-triton digits`: trains a small DiNAT on scikit-learn's handwritten digits, in about a minute on two cores."""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dinat_triton.commands.options import add_out
from dinat_triton.files import check_target
from dinat_triton.progress import ProgressBar

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

HELD_OUT = 360  # of 1797 images
BATCH = 64
SCALE = 4  # 8 x 8 pixels, enlarged to an image that the model's patches can cut


class Split(NamedTuple):
    images: Tensor  # [n, 1, 32, 32]
    labels: Tensor  # [n]


class Epoch(NamedTuple):
    loss: float
    accuracy: float


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=int, default=40, help="passes over the images (default: 40)")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (default: 3e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the split and the shifts (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU; the model is too small for more (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    add_out(parser, "folder of curve and weights (default: out)", Path("out"))


def run(args: argparse.Namespace) -> int:
    import torch

    from dinat_triton import plots
    from dinat_triton.models.checkpoints import save_state_dict

    curve, weights = args.out / "digits.png", args.out / "digits.safetensors"
    for path in (curve, weights):
        check_target(path, force=args.force, folder=True)
    _check(args)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train, test = (Split(*(x.to(args.device) for x in split)) for split in load(args.seed))
    model = build().to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"DiNAT of {parameters:,} parameters; {len(train.labels)} digits to learn, {len(test.labels)} held out")
    start = time.monotonic()
    history = fit(model, train, test, args.epochs, args.lr)
    seconds = time.monotonic() - start

    args.out.mkdir(parents=True, exist_ok=True)
    plots.save(draw(history), curve)
    save_state_dict(model.state_dict(), weights)
    print(f"{100 * history[-1].accuracy:.2f} % of the held-out digits right after {seconds:.0f} s")
    print(f"wrote {curve} and {weights}")
    return 0


def _check(args: argparse.Namespace) -> None:
    import torch

    most = os.cpu_count() or 1
    if args.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {args.epochs}")
    if not 0 < args.lr < math.inf:
        raise ValueError(f"--lr must be a number above 0, got {args.lr}")
    if not 1 <= args.threads <= most:
        raise ValueError(f"--threads must be between 1 and this machine's {most}, got {args.threads}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} cannot be used here: {error}") from error


def load(seed: int) -> tuple[Split, Split]:
    """The digits, normalized and enlarged, with as many of each kind in both parts as chance has it."""
    import torch

    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = torch.nn.functional.interpolate(images, scale_factor=SCALE, mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[HELD_OUT:], order[:HELD_OUT]
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def build() -> nn.Module:
    import timm

    import dinat_triton  # noqa: F401  (registers the models)

    options: dict[str, Any] = dict(
        in_chans=1, num_classes=10, embed_dim=32, depths=(2, 2), kernel_size=3, drop_path_rate=0.05
    )
    # The authors' initialisation suits wide models and long training; torch's own learns several times sooner here.
    return timm.create_model("dinat_mini", dilations="auto", img_size=8 * SCALE, weight_init="skip", **options)


def fit(model: nn.Module, train: Split, test: Split, epochs: int, lr: float) -> list[Epoch]:
    import torch
    from timm.optim import create_optimizer_v2
    from torch.nn.functional import cross_entropy

    optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=0.05)
    batches = len(train.labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches, pct_start=0.15)
    bar = ProgressBar(epochs * batches)
    history: list[Epoch] = []
    for _ in range(epochs):
        model.train()
        losses = []
        for rows in torch.randperm(len(train.labels), device=train.labels.device)[: batches * BATCH].split(BATCH):
            loss = cross_entropy(model(shifted(train.images[rows])), train.labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.step(f"loss {losses[-1]:.3f}" + (f", held-out {100 * history[-1].accuracy:.1f} %" if history else ""))
        history.append(Epoch(sum(losses) / batches, accuracy(model, test)))
    bar.close()
    return history


def shifted(images: Tensor) -> Tensor:
    """Moves a batch by up to one of the original pixels each way."""
    import torch

    padded = torch.nn.functional.pad(images, [SCALE] * 4, mode="replicate")
    top, left = torch.randint(0, 2 * SCALE + 1, (2,)).tolist()
    return padded[..., top : top + images.shape[-2], left : left + images.shape[-1]]


def accuracy(model: nn.Module, split: Split) -> float:
    import torch

    model.eval()
    with torch.inference_mode():
        return (model(split.images).argmax(-1) == split.labels).float().mean().item()


def draw(history: list[Epoch]) -> Figure:
    """Loss and held-out errors over the epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    epochs = range(1, len(history) + 1)
    axes.plot(epochs, [100 * (1 - e.accuracy) for e in history], color="tab:blue", label="held-out errors, %")
    axes.plot(epochs, [e.loss for e in history], color="tab:orange", label="training loss")
    axes.set(
        xlabel="epoch", yscale="log", title=f"DiNAT on digits: {100 * history[-1].accuracy:.2f} % held-out accuracy"
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure
