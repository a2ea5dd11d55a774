"""One schema for every benchmark: who ran what, where, in which version, and how long it took."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dinat_triton.store import cpu_name

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
SCHEMA = 2
FORWARD, BACKWARD, FORWARD_BACKWARD = PASSES = ("forward", "backward", "forward+backward")
BUSY = 0.5


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, over `calls` of them."""

    median: float
    p20: float
    p80: float
    calls: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        ordered = sorted(samples)
        p20, p80 = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
        return cls(statistics.median(ordered), p20, p80, len(ordered))


@dataclass
class Record:
    """One implementation on one problem: either a timing or the reason why there is none."""

    problem: dict[str, Any]
    implementation: str
    pass_: str
    dtype: str
    timing: Timing | None = None
    reason: str | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    """Of our records: time of each peer over ours."""
    work: dict[str, float] = field(default_factory=dict)
    """Bytes and operations that any implementation needs, the floor in milliseconds that follows, and fractions."""
    also: dict[str, Any] = field(default_factory=dict)
    """What else was measured, such as `peak_bytes` and `first_call_ms`."""

    @property
    def cell(self) -> tuple[str, str, str]:
        """What records have in common that can be set against each other."""
        return json.dumps(self.problem, sort_keys=True), self.pass_, self.dtype

    @property
    def title(self) -> str:
        """What was measured, by the names that the problem has, such as `dinat_mini@224/56x56-d8`."""
        names = "@".join(value for value in self.problem.values() if isinstance(value, str))
        batch = self.problem.get("batch", 1)
        return f"{names}{f' b{batch}' if batch > 1 else ''} {self.dtype} {self.pass_}"

    def to_dict(self) -> dict[str, Any]:
        timing = None if self.timing is None else {k: round(v, 5) for k, v in vars(self.timing).items()}
        ratios = {peer: round(ratio, 4) for peer, ratio in self.ratios.items()}
        return {
            "problem": self.problem,
            "implementation": self.implementation,
            "pass": self.pass_,
            "dtype": self.dtype,
            "ms": timing,
            "reason": self.reason,
        } | {name: found for name, found in (("ratios", ratios), ("work", self.work), ("also", self.also)) if found}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Record:
        timing = None if entry["ms"] is None else Timing(**entry["ms"])
        more = (dict(entry.get(name, {})) for name in ("ratios", "work", "also"))
        names = (entry["implementation"], entry["pass"], entry["dtype"])
        return cls(entry["problem"], *names, timing, entry["reason"], *more)


def add_ratios(records: Sequence[Record], ours: str) -> None:
    """Fills in `ratios` of our records from the peers' records of the same cell."""
    mine = {r.cell: r for r in records if r.implementation == ours and r.timing}
    for record in records:
        own = mine.get(record.cell)
        if own and own.timing and record.timing and record.implementation != ours:
            own.ratios[record.implementation] = record.timing.median / own.timing.median


def geometric_mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    weights = [1.0] * len(values) if weights is None else weights
    return math.exp(sum(w * math.log(v) for v, w in zip(values, weights, strict=True)) / sum(weights))


def measure(
    calls: Mapping[str, Callable[[], object]],
    *,
    budget: float,
    slice_s: float = 0.05,
    min_calls: int = 3,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Times warm callables side by side: they take turns, so that a busy moment of the machine meets them all.

    Each gets `budget` seconds, or the `min_calls` calls that take longer, up to four times its budget.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    active = list(calls)
    while active:
        for name in active:
            start = time.perf_counter()
            samples[name] += _burst(calls[name], slice_s, synchronize)
            spent[name] += time.perf_counter() - start
        active = [n for n in active if spent[n] < budget or (len(samples[n]) < min_calls and spent[n] < 4 * budget)]
    return {name: Timing.of(values) for name, values in samples.items()}


def measure_on(device: torch.device, calls: Mapping[str, Callable[[], object]], budget: float) -> dict[str, Timing]:
    """Times warm callables: on a GPU each by events, with a cold L2; elsewhere side by side.

    Args:
        device: Where they run.
        calls: By name.
        budget: Seconds for each; a GPU needs a fifth of them.
    """
    if device.type != "cuda":
        return measure(calls, budget=budget)
    from triton.testing import do_bench

    rep = 200 * budget
    return {n: Timing.of(do_bench(c, warmup=rep / 6, rep=rep, return_mode="all")) for n, c in calls.items()}


def _burst(call: Callable[[], object], seconds: float, synchronize: Callable[[], None]) -> list[float]:
    """Milliseconds of the calls that fit; a first short one only brings the caches back after another's turn."""
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while True:
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
        if time.perf_counter() > deadline:
            return times[1:] or times


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """The machine and the versions, with nothing in it that names a person or a path."""
    device = torch.device(device)
    return {
        "device": device_name(device),
        "device_type": device.type,
        "driver": driver_version() if device.type == "cuda" else None,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load_before": load_average(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in ("triton", "natten", "timm", "dinat-triton")},
        },
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def prepare_process(threads: int | None = None) -> None:
    """Threads as asked for, and a warning if the machine is busy.

    Torch's threads wait for each other in a spin: one more busy process can make a short call 50 times as long.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    load = load_average()
    if load is not None and load > BUSY:
        print(f"The machine was busy in the last minute (load {load:.1f}): these times may mislead.", file=sys.stderr)


def load_average() -> float | None:
    """Of the last minute; a machine that did something else gives no honest times."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def driver_version() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def default_path(device: str | torch.device, bench: str) -> Path:
    """Where a benchmark keeps its results: one folder per device, in a checkout or else where the command runs."""
    name = re.sub(r"\((r|tm)\)", "", device_name(torch.device(device)).lower())
    results = FOLDER / "results" if (ROOT / "pyproject.toml").exists() else Path("bench-results")
    return results / re.sub(r"[^a-z0-9]+", "-", name).strip("-") / f"{bench}.json"


def save(path: Path, env: Mapping[str, Any], records: Sequence[Record], **more: Any) -> None:
    """Writes one result file; a record per line, so that a change of results reads well in a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"schema": SCHEMA, "environment": env, **more}
    lines = ",\n".join("    " + json.dumps(record.to_dict()) for record in records)
    text = json.dumps(head, indent=2).removesuffix("\n}")
    path.write_text(f'{text},\n  "records": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    """Reads a result file; refuses one that is not whole or of another schema."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a whole result file: {error}") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} must be a result file of schema {SCHEMA}, got schema {schema}")
    return data


def load_records(path: Path) -> list[Record]:
    """The records of a result file."""
    try:
        return [Record.from_dict(entry) for entry in load(path)["records"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no records of a benchmark: {error!r}") from None


def shown(path: Path) -> str:
    """A path for a message: within the repository relative to it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def verdict_line(verdict: Mapping[str, Any]) -> str:
    """A target, what was reached, and whether that meets it."""
    state = {True: "met", False: "MISSED", None: "not measured"}[verdict["met"]]
    value = "" if verdict["value"] is None else f"{verdict['value']:.2f}"
    return f"{verdict['target']:<80} {value:>8}  {state}".rstrip()


def milliseconds(ms: float) -> str:
    """Three digits, whether of a kernel or of a training step."""
    return f"{ms:.{max(0, 2 - math.floor(math.log10(ms)))}f}" if ms > 0 else "0"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, marked if the tree differs from it; None outside a repository."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=FOLDER, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ":/dinat_triton", ":/kernels", ":/models", ":/bench"
        )
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
