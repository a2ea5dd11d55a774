"""Tables of plain text, and the numbers in them."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log10


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def milliseconds(ms: float) -> str:
    """Three digits, whether of a kernel or of a training step."""
    return f"{ms:.{max(0, 2 - floor(log10(ms)))}f}" if ms > 0 else "0"


def short(rate: float) -> str:
    """Three digits and a prefix, such as `4.3 T`."""
    power = max(0, min(5, floor(log10(rate) / 3)))
    return f"{rate / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}"
