"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_out(parser: argparse._ActionsContainer, what: str, default: Path | None = None) -> None:
    """Adds the output options: where to write, and whether to replace what is there."""
    parser.add_argument("-o", "--out", metavar="PATH", type=Path, default=default, help=what)
    add_force(parser)


def add_force(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--force", action="store_true", help="replace files that are there already")
