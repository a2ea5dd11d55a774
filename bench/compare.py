"""One result file against another, record by record: a branch against main, a GPU driver against the one before.

A change counts only if the times do not overlap: the 80th percentile of one lies below the 20th of the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinat_triton.bench.harness import Record, Results, Timing, geometric_mean
from dinat_triton.commands.options import check_names, split
from dinat_triton.commands.tables import milliseconds, table

SLOWER, FASTER, SAME = VERDICTS = ("slower", "faster", "same")
# What makes times of two files incomparable, or at least suspicious.
ENVIRONMENT = ("device", "driver", "threads", "versions")


@dataclass(frozen=True)
class Pair:
    """One record as both files have it."""

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
    """Pairs of timings that both have, in the order of A."""
    of_b = {(*r.cell, r.implementation): r.timing for r in b}
    pairs = []
    for record in a:
        other = of_b.get((*record.cell, record.implementation))
        if record.timing and other:
            pairs.append(Pair(f"{record.title} {record.implementation}", record.timing, other))
    return pairs


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Differences between the environments of two files."""
    left, right = ({name: e.get(name) for name in ENVIRONMENT} | e.get("versions", {}) for e in (a, b))
    both = [name for name in {**left, **right} if name != "versions"]
    return [f"{n} {left.get(n)} and {right.get(n)}" for n in both if left.get(n) != right.get(n)]


def run(args: argparse.Namespace) -> int:
    """Prints B against A, and returns 1 if anything is slower in B."""
    results = [Results.load(path) for path in (args.a, args.b)]
    records = [found.records for found in results]
    if args.only is not None:
        only = split(args.only)
        check_names("implementation", only, dict.fromkeys(r.implementation for each in records for r in each))
        records = [[r for r in each if r.implementation in only] for each in records]
    pairs = pairs_of(*records)
    if not pairs:
        raise ValueError(f"{args.a} and {args.b} have no timed record in common")
    for difference in differences(*(found.environment for found in results)):
        print(f"Measured under different conditions: {difference}", file=sys.stderr)
    rows = [[pair.title, _shown(pair.a), _shown(pair.b), f"{pair.ratio:.3f}", pair.verdict] for pair in pairs]
    print(table(["median ms (20 - 80 %)", "A", "B", "B over A", ""], rows))
    counts = ", ".join(f"{sum(pair.verdict == verdict for pair in pairs)} {verdict}" for verdict in VERDICTS)
    mean = geometric_mean([pair.ratio for pair in pairs])
    print(f"\nB takes {mean:.3f}x the time of A in geometric mean of {len(pairs)}: {counts}")
    return int(any(pair.verdict == SLOWER for pair in pairs))


def _shown(timing: Timing) -> str:
    return "{} ({} - {})".format(*map(milliseconds, (timing.median, timing.p20, timing.p80)))


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A.json", help="a result file")
    parser.add_argument("b", type=Path, metavar="B.json", help="another of the same benchmark")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these implementations, such as tiled")
