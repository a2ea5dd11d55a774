"""A beat about once a second, at the same batch in all processes, at which they tell each other what concerns all."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from accelerate import Accelerator

SECONDS = 1.0


class Beat:
    """Counts batches up to the next beat. Asking more often would make devices wait for each other."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.every = self.left = 1
        self.last = time.monotonic()

    def due(self) -> bool:
        """Counts a batch, and says whether it is time to `share`."""
        self.left -= 1
        return not self.left

    def share(self, values: Sequence[float]) -> list[float]:
        """The means of the values over all processes."""
        pace = (time.monotonic() - self.last) / self.every
        shared = torch.tensor([*values, pace], device=self.accelerator.device)
        *means, pace = self.accelerator.reduce(shared, "mean").tolist()
        self.every = self.left = max(1, min(2 * self.every, int(SECONDS / max(pace, 1e-6))))
        self.last = time.monotonic()
        return means
