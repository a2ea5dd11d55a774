"""A progress bar for the terminal."""

from __future__ import annotations

import sys
import time


class ProgressBar:
    """A line that is rewritten on a terminal, and written ten times elsewhere."""

    WIDTH = 30

    def __init__(self, total: int):
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.every = 1 if sys.stderr.isatty() else max(1, total // 10)

    def step(self, text: str) -> None:
        """One more is done."""
        self.done += 1
        if self.done % self.every == 0:
            self._write(text)

    def note(self, text: str) -> None:
        """Says what is being done, on a terminal."""
        if self.every == 1 and sys.stderr.isatty():
            self._write(text)

    def close(self) -> None:
        """Leaves the line behind."""
        if self.every == 1:
            print(file=sys.stderr)

    def _write(self, text: str) -> None:
        filled = self.WIDTH * self.done // self.total
        left = (time.monotonic() - self.start) * (self.total - self.done) / max(1, self.done)
        bar = f"[{'#' * filled:{self.WIDTH}}] {100 * self.done // self.total:3} % {left:3.0f} s left  {text}"
        print(f"\r\033[K{bar}" if self.every == 1 else bar, end="", file=sys.stderr, flush=True)
        if self.every > 1:
            print(file=sys.stderr)
