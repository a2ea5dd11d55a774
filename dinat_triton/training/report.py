"""Reports that a run leaves for people: metrics.csv, curve.png and a line for each epoch."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinat_triton.files import replacing

Row = dict[str, Any]


def line(row: Row, epochs: int) -> str:
    return (
        f"epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}, validation loss {row['loss']:.4f}, "
        f"top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} %, {row['images_per_s']:.0f} images/s"
    )


def best(history: Sequence[Row]) -> Row:
    """The first of the epochs with the highest top-1."""
    return max(history, key=lambda row: row["top1"])


def write_table(history: Sequence[Row], run: Path) -> None:
    with replacing(run / "metrics.csv") as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)


def write_curve(history: Sequence[Row], run: Path) -> None:
    from dinat_triton import plots

    plots.save(draw(history), run / "curve.png")


def draw(history: Sequence[Row]) -> Any:
    """Losses and errors over the epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    epochs = [row["epoch"] for row in history]
    axes.plot(epochs, [row["train_loss"] for row in history], color="tab:orange", label="training loss")
    axes.plot(epochs, [row["loss"] for row in history], color="tab:green", label="validation loss")
    axes.plot(epochs, [100 - row["top1"] for row in history], color="tab:blue", label="validation errors, %")
    top = best(history)
    axes.set(xlabel="epoch", yscale="log", title=f"best: {top['top1']:.2f} % top-1 in epoch {top['epoch']}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure
