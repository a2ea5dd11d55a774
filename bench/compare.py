"""One result file against another, record by record: a branch against main, a GPU driver against the one before.

A change counts only if the times do not overlap: the 80th percentile of one lies below the 20th of the other.

exit codes: 0 nothing is slower in B, 1 something is, 2 the files cannot be compared
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinat_triton.bench import harness
from dinat_triton.bench.harness import Record, Timing
from dinat_triton.bench.selection import check_names, split

SLOWER, FASTER, SAME = "slower", "faster", "same"
# What makes times of two files incomparable, or at least suspicious.
ENVIRONMENT = ("device", "driver", "threads", "versions")


@dataclass(frozen=True)
class Pair:
    """The same record of both files."""

    title: str
    a: Timing
    b: Timing

    @property
    def ratio(self) -> float:
        """Time of B over that of A."""
        return self.b.median / self.a.median

    @property
    def verdict(self) -> str:
        if self.b.p20 > self.a.p80:
            return SLOWER
        return FASTER if self.b.p80 < self.a.p20 else SAME


def pairs_of(a: Sequence[Record], b: Sequence[Record]) -> list[Pair]:
    """What both have timed, in the order of A."""
    of_b = {(*r.cell, r.implementation): r.timing for r in b}
    pairs = []
    for record in a:
        other = of_b.get((*record.cell, record.implementation))
        if record.timing and other:
            pairs.append(Pair(f"{record.title} {record.implementation}", record.timing, other))
    return pairs


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """How the environments of two files differ."""
    found = []
    for name in ENVIRONMENT:
        left, right = a.get(name), b.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            both = dict.fromkeys((*left, *right))
            found += [f"{n} {left.get(n)} and {right.get(n)}" for n in both if left.get(n) != right.get(n)]
        elif left != right:
            found.append(f"{name} {left} and {right}")
    return found


def compare_files(a: Path, b: Path, only: Sequence[str] | None = None) -> int:
    """Prints B against A, and returns 1 if anything is slower in B.

    Args:
        a: A result file.
        b: Another of the same benchmark.
        only: Implementations to look at; all by default.
    """
    records = [harness.load_records(path) for path in (a, b)]
    if only is not None:
        known = dict.fromkeys(r.implementation for r in (*records[0], *records[1]))
        check_names("implementation", only, known)
        records = [[r for r in each if r.implementation in only] for each in records]
    pairs = pairs_of(*records)
    if not pairs:
        raise ValueError(f"{a} and {b} have no timed record in common")
    for difference in differences(*(harness.load(path)["environment"] for path in (a, b))):
        print(f"Measured under different conditions: {difference}", file=sys.stderr)
    print(table(pairs))
    counts = {verdict: sum(pair.verdict == verdict for pair in pairs) for verdict in (SLOWER, FASTER, SAME)}
    mean = harness.geometric_mean([pair.ratio for pair in pairs])
    print(f"\nB takes {mean:.3f}x the time of A in geometric mean of {len(pairs)}: "
          f"{counts[SLOWER]} slower, {counts[FASTER]} faster, {counts[SAME]} the same")  # fmt: skip
    return 1 if counts[SLOWER] else 0


def table(pairs: Sequence[Pair]) -> str:
    def shown(timing: Timing) -> str:
        return f"{harness.milliseconds(timing.median)} ({harness.milliseconds(timing.p20)} - " \
               f"{harness.milliseconds(timing.p80)})"  # fmt: skip

    rows = [[pair.title, shown(pair.a), shown(pair.b), f"{pair.ratio:.3f}", pair.verdict] for pair in pairs]
    return harness.table(["median ms (20 - 80 %)", "A", "B", "B over A", ""], rows)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Lets a benchmark compare instead of measure."""
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"),
                        help="measure nothing: set B against A, and exit with 1 if anything is slower")  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A.json", help="a result file")
    parser.add_argument("b", type=Path, metavar="B.json", help="another of the same benchmark")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these implementations, such as tiled")


def run(args: argparse.Namespace) -> int:
    return compare_files(args.a, args.b, None if args.only is None else split(args.only))
