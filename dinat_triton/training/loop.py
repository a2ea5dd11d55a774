"""A run from its first or next step to its last: epochs, validation, and what is written on the way."""

from __future__ import annotations

import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from dinat_triton.models.checkpoints import save_state_dict
from dinat_triton.training import checkpoint, report
from dinat_triton.training.beat import Beat
from dinat_triton.training.data import Samples, data_config, train_loader, validation_loader
from dinat_triton.training.engine import Engine
from dinat_triton.training.evaluate import evaluate
from dinat_triton.training.recipe import Recipe

BETWEEN_CURVES = 60.0  # seconds


class Terminated(Exception):
    """SIGTERM came; the run can be resumed."""


class Run:
    """A run and its folder.

    Args:
        recipe: What to do.
        folder: To write to.
        accelerator: From `accelerator_for`.
        model: From `build`.
        train: Images to learn from.
        val: Images to validate on.
        batch: Images of a step, of all processes together.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, accelerator: Accelerator, model: nn.Module, train: Samples, val: Samples,
        batch: int,
    ):  # fmt: skip
        self.recipe, self.folder, self.accelerator, self.train, self.val = recipe, folder, accelerator, train, val
        self.batch, self.steps = batch, len(train) // batch  # steps of an epoch
        self.epochs = recipe.epochs + recipe.cooldown_epochs
        self.history: list[report.Row] = []
        self.loss_sum = torch.zeros((), device=accelerator.device)  # over the steps of this epoch
        config = data_config(recipe, model)
        self.engine = Engine(recipe, model, accelerator, batch, self.steps)
        self.loader = accelerator.prepare(train_loader(train, recipe, config, batch))
        self.val_loader = accelerator.prepare(validation_loader(val, recipe, config, batch))
        self.beat = Beat(accelerator)
        self.bar = tqdm(
            total=self.epochs * self.steps * batch, unit=" images", unit_scale=True, dynamic_ncols=True,
            disable=not (accelerator.is_main_process and sys.stderr.isatty()),
        )  # fmt: skip
        self.terminated = False
        self.saved_at = time.monotonic()
        self.drawn_at = -math.inf

    def state(self) -> dict[str, Any]:
        mean = self.accelerator.reduce(self.loss_sum, "mean")
        return {"engine": self.engine.state(), "batch": self.batch, "loss_sum": mean.item(), "history": self.history}

    def load(self, state: dict[str, Any]) -> None:
        self.engine.load(state["engine"])
        self.loss_sum.fill_(state["loss_sum"])
        self.history = state["history"]
        self.bar.initial = self.bar.n = self.engine.done * self.batch

    def go(self) -> None:
        """Goes on until all epochs are done, or SIGTERM comes."""
        handler = signal.signal(signal.SIGTERM, self._terminate)
        try:
            with self.bar:
                for epoch in range(len(self.history), self.epochs):
                    start, before = time.monotonic(), self.engine.done
                    self._train(epoch)
                    seconds = time.monotonic() - start
                    self._finish(epoch, (self.engine.done - before) * self.batch / max(seconds, 1e-9))
        finally:
            signal.signal(signal.SIGTERM, handler)

    def _terminate(self, *_: object) -> None:
        self.terminated = True

    def _train(self, epoch: int) -> None:
        """The steps of an epoch that are still to do."""
        done = self.engine.done - epoch * self.steps
        if done == self.steps:  # it ended while it validated
            return
        self.train.epoch.fill_(epoch)
        self.loader.set_epoch(epoch)
        loader = self.loader
        if done:
            loader = self.accelerator.skip_first_batches(loader, done)
            loader.set_epoch(epoch)
        if self.engine.mixup is not None and self.recipe.mixup_off_epoch:
            self.engine.mixup.mixup_enabled = epoch < self.recipe.mixup_off_epoch
        self.engine.parallel.train()
        self.bar.set_description(f"epoch {epoch + 1}/{self.epochs}")
        for images, labels in loader:
            self.take(images, labels)

    def take(self, images: Tensor, labels: Tensor) -> None:
        """Takes a step, and does what is due after it."""
        self.loss_sum += self.engine.step(images, labels)
        self.bar.update(self.batch)
        self._after_batch()

    def _finish(self, epoch: int, images_per_s: float) -> None:
        """Validates, and writes what there is after an epoch."""
        scores = evaluate(self.engine.result, self.val_loader, self.accelerator, self._after_batch)
        loss = self.accelerator.reduce(self.loss_sum, "mean").item() / self.steps
        self._check(loss)
        row = {
            "epoch": epoch + 1, "step": self.engine.done, "lr": self.engine.lr, "train_loss": loss,
            "loss": scores.loss, "top1": scores.top1, "top5": scores.top5, "images_per_s": images_per_s,
        }  # fmt: skip
        self.history.append({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()})
        self.loss_sum.zero_()
        self.accelerator.log(row, step=self.engine.done)
        weights = self.engine.weights()
        if self.accelerator.is_main_process:
            tqdm.write(report.line(row, self.epochs))
            save_state_dict(weights, self.folder / "last.safetensors")
            if report.best(self.history) is self.history[-1]:
                save_state_dict(weights, self.folder / "best.safetensors")
            report.write_table(self.history, self.folder)
            if epoch + 1 == self.epochs or time.monotonic() - self.drawn_at > BETWEEN_CURVES:
                report.write_curve(self.history, self.folder)
                self.drawn_at = time.monotonic()
        self._save()

    def _after_batch(self, *_: object) -> None:
        """Does what is due about once a second, whether it trains or validates."""
        if not self.beat.due():
            return
        mean = self.loss_sum.item() / max(1, self.engine.done - len(self.history) * self.steps)
        late = time.monotonic() - self.saved_at >= 60 * self.recipe.checkpoint_minutes
        loss, terminated, write = self.beat.share([mean, self.terminated, late])
        self._check(loss)
        self.bar.set_postfix(loss=f"{loss:.3f}", lr=f"{self.engine.lr:.2g}", refresh=False)
        self.accelerator.log({"running_loss": loss, "lr": self.engine.lr}, step=self.engine.done)
        if terminated or write:
            self._save()
        if terminated:
            raise Terminated

    def _check(self, loss: float) -> None:
        """Stops where going on makes no sense."""
        if not math.isfinite(loss):
            raise self._failure(f"the loss is {loss}")
        self.train.check()
        self.val.check()

    def _failure(self, what: str) -> RuntimeError:
        path = checkpoint.latest(self.folder)
        good = f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"
        return RuntimeError(f"{what} after step {self.engine.done}: {good}")

    def _save(self) -> None:
        """Writes a checkpoint."""
        state = self.state()
        if self.accelerator.is_main_process:
            if not all(tensor.isfinite().all() for tensor in state["engine"]["model"].values()):
                raise self._failure("weights are no numbers")
            checkpoint.write(self.folder, state, self.engine.done, self.recipe.checkpoint_hist)
        self.saved_at = time.monotonic()
