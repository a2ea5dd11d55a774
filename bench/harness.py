"""One schema and one clock for every benchmark: who ran what, where, in which version, and how long it took."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dinat_triton.files import replacing
from dinat_triton.layers import Layer
from dinat_triton.store import cpu_name, slug
from dinat_triton.work import Ceilings

FOLDER = Path(__file__).resolve().parent
SCHEMA = 3
BUSY = 0.5
TIME_IS_UP = "the time was up"


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
        # As a file keeps them, so that its report is the one that was printed.
        median, p20, p80 = (round(value, 5) for value in (statistics.median(ordered), p20, p80))
        return cls(median, p20, p80, len(ordered))


@dataclass
class Record:
    """One implementation on one problem: a timing, or the reason why there is none.

    Attributes:
        problem: A layer, or what else makes records comparable, such as the batch of a model.
        implementation: A backend, a peer, a model.
        pass_: Forward, training, ...
        dtype: Dtype of the tensors.
        timing: Times of warm calls.
        reason: Why there is no timing.
        also: Other measurements and counts, such as `peak_bytes`, `first_call_ms` and `work`.
    """

    problem: dict[str, Any]
    implementation: str
    pass_: str
    dtype: str
    timing: Timing | None = None
    reason: str | None = None
    also: dict[str, Any] = field(default_factory=dict)

    @property
    def cell(self) -> tuple[str, str, str]:
        """Key that records share which can be set against each other."""
        return json.dumps(self.problem, sort_keys=True), self.pass_, self.dtype

    @property
    def is_ours(self) -> bool:
        return self.implementation.startswith(("tiled", "triton", "nat_", "dinat_"))

    @property
    def failed(self) -> bool:
        """Whether it is ours and did not run. What nobody had time for is no failure."""
        return self.is_ours and self.reason not in (None, TIME_IS_UP)

    @property
    def title(self) -> str:
        """The problem by the names that it has, such as `dinat_mini@224/56x56-d8 b128 bfloat16 forward`."""
        names = [value for value in self.problem.values() if isinstance(value, str)]
        return " ".join([*names, f"b{self.problem.get('batch', 1)}", self.dtype, self.pass_])

    def to_dict(self) -> dict[str, Any]:
        names = {"implementation": self.implementation, "pass": self.pass_, "dtype": self.dtype}
        ms = self.timing and asdict(self.timing)
        return {"problem": self.problem, **names, "ms": ms, "reason": self.reason, "also": self.also}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Record:
        timing = entry["ms"] and Timing(**entry["ms"])
        names = (entry["implementation"], entry["pass"], entry["dtype"])
        return cls(entry["problem"], *names, timing, entry["reason"], dict(entry["also"]))


@dataclass(frozen=True)
class Cell:
    """A layer, dtype and pass: what is measured side by side."""

    layer: Layer
    dtype: str
    pass_: str

    @property
    def key(self) -> tuple[str, str, str]:
        """`Record.cell` of its records."""
        return self.record("").cell

    def record(self, implementation: str, **found: Any) -> Record:
        return Record(asdict(self.layer), implementation, self.pass_, self.dtype, **found)


@dataclass
class Results:
    """Everything that one run of a benchmark found.

    Attributes:
        bench: The subject: layers, models, ...
        environment: The machine and the versions.
        records: The measurements.
        ceilings: The most that the device does per second, where work is compared with it.
    """

    bench: str
    environment: dict[str, Any]
    records: list[Record]
    ceilings: Ceilings | None = None

    def save(self, path: Path) -> None:
        """Writes a file with a record per line, so that a change of results reads well in a diff."""
        ceilings = self.ceilings and asdict(self.ceilings)
        head = {"schema": SCHEMA, "bench": self.bench, "environment": self.environment, "ceilings": ceilings}
        lines = ",\n".join("    " + json.dumps(record.to_dict()) for record in self.records)
        text = json.dumps(head, indent=2).removesuffix("\n}")
        with replacing(path) as beside:
            beside.write_text(f'{text},\n  "records": [\n{lines}\n  ]\n}}\n', encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Reads a file; refuses one that is not whole or of another schema."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a whole result file: {error}") from None
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"{path} must be a result file of schema {SCHEMA}, got schema {schema}")
        try:
            records = [Record.from_dict(entry) for entry in data["records"]]
            ceilings = data["ceilings"] and Ceilings(**data["ceilings"])
            return cls(data["bench"], data["environment"], records, ceilings)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no results of a benchmark: {error!r}") from None


def geometric_mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    weights = [1.0] * len(values) if weights is None else weights
    return math.exp(sum(w * math.log(v) for v, w in zip(values, weights, strict=True)) / sum(weights))


def reasons(records: Sequence[Record]) -> list[str]:
    """Reasons for missing times, each once with the number of records it holds for."""
    found: dict[str, int] = {}
    for r in records:
        if r.reason:
            line = f"- {r.implementation}, {r.pass_}, {r.dtype}: {r.reason}"
            found[line] = found.get(line, 0) + 1
    return [f"{line} ({n} times)" if n > 1 else line for line, n in sorted(found.items())]


# The clock


TURNS = 6


def measure(calls: Mapping[str, Callable[[], object]], budget: float, device: str = "cpu") -> dict[str, Timing]:
    """Times warm callables side by side: they take turns, so that a busy moment of the machine meets them all.

    Each gets `budget` seconds, or the three calls that take longer, up to four times its budget.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    active = list(calls)
    while active:
        for name in active:
            start = time.perf_counter()
            samples[name] += _burst(calls[name], device, budget / TURNS)
            spent[name] += time.perf_counter() - start
        active = [n for n in active if spent[n] < budget or (len(samples[n]) < 3 and spent[n] < 4 * budget)]
    return {name: Timing.of(values) for name, values in samples.items()}


def measure_on(device: torch.device, calls: Mapping[str, Callable[[], object]], budget: float) -> dict[str, Timing]:
    """Times warm callables: side by side, or on a GPU by events with a cold L2, in a fifth of the seconds."""
    if device.type != "cuda":
        return measure(calls, budget)
    from triton.testing import do_bench

    rep = 200 * budget
    return {n: Timing.of(do_bench(c, warmup=rep / 6, rep=rep, return_mode="all")) for n, c in calls.items()}


def _burst(call: Callable[[], object], device: str, seconds: float) -> list[float]:
    """Milliseconds of the calls that fit; a first short one only brings the caches back after another's turn."""
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while True:
        times.append(elapsed_ms(call, device))
        if time.perf_counter() > deadline:
            return times[1:] or times


def elapsed_ms(call: Callable[[], object], device: str = "cpu") -> float:
    """Milliseconds of one call, and of what a GPU has to do for it."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return 1e3 * (time.perf_counter() - start)


@contextmanager
def stoppable() -> Iterator[None]:
    """Lets Ctrl-C, or a `timeout` around the command, end what is within and no more: what it measured is kept."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print("Stopped: what was measured until now is kept.", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, before)


# The machine


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the versions, with nothing in it that names a person or a path."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
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
    """Threads as asked for, no warnings about missing GPUs and uncompiled calls, and one if the machine is busy.

    Torch's threads wait for each other in a spin: one more busy process can make a short call 50 times as long.
    """
    warnings.filterwarnings("ignore", module=r"(torch|natten)\b")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if threads is not None:
        torch.set_num_threads(threads)
    load = load_average()
    if load is not None and load > BUSY:
        print(f"The machine was busy in the last minute (load {load:.1f}): these times may mislead.", file=sys.stderr)


def load_average() -> float | None:
    """Load of the last minute: with more to do a machine gives no honest times."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def results_folder(device: torch.device) -> Path:
    """The folder of a device's results: in a checkout, or else where the command runs."""
    results = FOLDER / "results" if (FOLDER.parent / "pyproject.toml").exists() else Path("bench-results")
    return results / slug(device_name(device).replace("(R)", ""))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, marked if the tree differs from it; None outside a repository."""
    head = _command("git", "rev-parse", "HEAD")
    sources = [f":/{name}" for name in ("dinat_triton", "kernels", "models", "bench")]
    changed = _command("git", "status", "--porcelain", "--untracked-files=no", "--", *sources)
    return head and head + ("+changes" if changed else "")


def _command(*words: str) -> str | None:
    """Output of a program, or None if it cannot run."""
    try:
        return subprocess.run(words, cwd=FOLDER, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
