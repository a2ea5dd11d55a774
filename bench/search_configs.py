"""Finds the configs that `kernels/tuned/` ships, on a machine that needs no GPU.

Every candidate is compiled for the architecture as the layers of DiNAT would launch it, dropped if the inspector
complains about any of its kernels, and ranked by the estimate. What a GPU measured beats what this finds.

python -m dinat_triton.bench.search_configs --arch sm_90 sm_80 --dim 32 64 --bits 16
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
import triton

from dinat_triton.kernels import launch as backend
from dinat_triton.kernels.estimate import Step, estimate, record
from dinat_triton.kernels.inspect import Launch, Report, inspect
from dinat_triton.kernels.targets import TARGETS, Target, find_target
from dinat_triton.kernels.tuning import PASSES, TABLES, Config, rule
from dinat_triton.layers import Layer, layers_of

# Rows, chunk, most columns in one chunk, warps.
SHAPES = {
    "forward": [(64, 32, 64, 4), (64, 64, 64, 4), (128, 64, 64, 8), (32, 32, 64, 2), (32, 64, 64, 4), (16, 32, 32, 4),
                (16, 64, 64, 4), (32, 32, 32, 4), (64, 16, 64, 4), (64, 64, 128, 4)],
    "query_backward": [(16, 128, 128, 4), (16, 64, 64, 4), (32, 128, 128, 4), (64, 32, 64, 4), (64, 64, 64, 4),
                       (32, 64, 64, 4), (32, 64, 64, 2), (16, 32, 64, 4), (16, 16, 32, 2)],
    "key_backward": [(64, 32, 64, 4), (64, 64, 64, 4), (128, 32, 64, 8), (32, 32, 64, 2), (32, 64, 64, 4),
                     (16, 32, 32, 4), (16, 64, 64, 4), (32, 32, 32, 4), (16, 16, 32, 2)],
    "closed_backward": [(64, 32, 64, 4), (64, 32, 64, 8), (16, 32, 32, 4)],
}  # fmt: skip
STAGES = (1, 2)
# The rest ships wherever these do: their kernels differ in shared memory alone.
ALIKE = {"sm_80": ("sm_86", "sm_89", "sm_120")}
DTYPES = {16: torch.bfloat16, 32: torch.float32}


def layers(dim: int) -> list[tuple[Layer, int]]:
    """What counts, with its batch: every layer of DiNAT-Mini at 224, and ragged ones."""
    ragged = [layer for layer in layers_of("dinat_mini@coco", dim) if layer.shape == (100, 152)]
    return [(layer, 128) for layer in layers_of("dinat_mini@224", dim)] + [(layer, 8) for layer in ragged]


class Search:
    """Of one architecture, head dim and width, pass after pass."""

    def __init__(self, target: Target, dim: int, bits: int, shared: int | None = None):
        self.target, self.dim, self.bits = target, dim, bits
        self.shared = target.shared if shared is None else shared
        self.chosen: dict[str, Config] = {name: rule(name, dim, bits) for name in PASSES}
        self.reports: dict[Launch, Report] = {}

    def report(self, launch: Launch) -> Report:
        if launch not in self.reports:
            self.reports[launch] = inspect(launch, self.target)
        return self.reports[launch]

    def seconds(self, configs: dict[str, Config], counts: Callable[[Step], bool]) -> float:
        """Estimated time of the steps that count, or infinity if one of their kernels must not ship."""
        total = 0.0
        with mock.patch.object(backend, "choose_config", lambda name, *_: configs[name]):
            for layer, batch in layers(self.dim):
                _, steps = record(layer, self.target, DTYPES[self.bits], batch)
                steps = [step for step in steps if counts(step)]
                for step in steps:
                    report = self.report(step.launch)
                    if report.complaints or report.shared > self.shared:
                        return float("inf")
                found = estimate(steps, self.reports, self.target)
                total += layer.count * sum(each["us"] for each in found) * 1e-6
        return total

    def best(self, name: str) -> Config:
        def counts(step: Step) -> bool:
            # Whether tiles can be closed decides which kernels a backward runs at all.
            return step.backward if name == "closed_backward" else step.name == name

        default = self.chosen[name]
        candidates = [
            replace(default, rows=rows, chunk=chunk, one_chunk=one_chunk, warps=warps, stages=stages)
            for (rows, chunk, one_chunk, warps), stages in product(SHAPES[name], STAGES)
        ]
        times = {}
        for config in dict.fromkeys([default, *candidates]):
            try:
                times[config] = self.seconds(self.chosen | {name: config}, counts)
            except Exception as error:
                self.say(f"{name} {config}: {type(error).__name__}: {str(error).strip()[:80]}")
        found = min(times, key=lambda config: times[config])
        # What is hardly better is not worth an exception from the rule.
        if times[default] < 1.02 * times[found]:
            found = default
        self.say(f"{name}: {1e6 * times[default]:.0f} -> {1e6 * times[found]:.0f} us, {found}")
        return found

    def say(self, text: str) -> None:
        print(f"{self.target.name} {self.dim} {self.bits}: {text}", file=sys.stderr, flush=True)

    def run(self) -> dict[str, dict[str, int]]:
        """The passes whose best config is not the rule's, as entries of a table."""
        for name in ("forward", "query_backward", "key_backward", "closed_backward"):
            self.chosen[name] = self.best(name)
        return {
            f"{name}/{self.dim}/{self.bits}": asdict(config)
            for name, config in self.chosen.items()
            if config != rule(name, self.dim, self.bits)
        }


def search(name: str, dim: int, bits: int) -> dict[str, dict[str, int]]:
    target = find_target(name)
    alike = [TARGETS[other].shared for other in ALIKE.get(name, ())]
    return Search(target, dim, bits, min([target.shared, *alike])).run()


def write(name: str, found: dict[str, dict[str, int]], folder: Path) -> None:
    """Adds entries to an architecture's table."""
    path = folder / f"{name}.json"
    configs = json.loads(path.read_text())["configs"] if path.exists() else {}
    configs = dict(sorted((configs | found).items()))
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    head = json.dumps({"source": "offline inspection", "versions": versions}, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in configs.items())
    path.write_text(f'{head},\n "configs": {{\n{lines}\n }}\n}}\n')


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dinat_triton.bench.search_configs", description="Finds configs offline.")
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90", "sm_100", "gfx942"], choices=TARGETS)
    parser.add_argument("--dim", type=int, nargs="+", default=[32], choices=(16, 32, 64, 128, 256))
    parser.add_argument("--bits", type=int, nargs="+", default=[16], choices=DTYPES)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=TABLES, help="folder of the tables (default: where they ship)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    cells = list(product(options.arch, options.dim, options.bits))
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for (arch, *_), found in zip(cells, pool.map(search, *zip(*cells, strict=True)), strict=True):
            for name in (arch, *ALIKE.get(arch, ())):
                write(name, found, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
