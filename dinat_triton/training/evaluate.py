"""Accuracy and loss over a set of images, each counted once on however many processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader


@dataclass
class Scores:
    """Percentages, the mean loss, and how often each class was there and was found."""

    top1: float
    top5: float
    loss: float
    images_per_s: float
    count: Tensor  # [classes]
    correct: Tensor  # [classes]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    accelerator: Any,
    after_batch: Callable[..., object] = lambda *_: None,
) -> Scores:
    """Evaluates a model. All processes return the same.

    Args:
        model: Of the same weights in all processes.
        loader: Prepared by the accelerator. Images labelled -1 do not count.
        accelerator: Of accelerate.
        after_batch: Called with the logits and labels of all processes' images, in the loader's order.
    """
    model.eval()
    start = time.monotonic()
    count = correct = torch.zeros(0)
    loss = top5 = torch.zeros((), device=accelerator.device)
    for images, labels in loader:
        with accelerator.autocast():
            logits = model(images)
        logits, labels = accelerator.gather_for_metrics((logits.float(), labels))
        after_batch(logits, labels)
        logits, labels = logits[labels >= 0], labels[labels >= 0]
        classes = logits.shape[1]
        if not len(count):
            count, correct = torch.zeros(2, classes, device=accelerator.device).unbind()
        hits = logits.topk(min(5, classes)).indices == labels[:, None]
        count += labels.bincount(minlength=classes)
        correct += labels[hits[:, 0]].bincount(minlength=classes)
        top5 = top5 + hits.sum()
        loss = loss + cross_entropy(logits, labels, reduction="sum")
    total = count.sum().item()
    if not total:
        raise ValueError("there is no readable image to validate on")
    return Scores(
        100 * correct.sum().item() / total, 100 * top5.item() / total, loss.item() / total,
        total / (time.monotonic() - start), count.cpu(), correct.cpu(),
    )  # fmt: skip
