"""`dinat-triton tune`: the fastest tiles and launch options for this machine, or for a GPU that is elsewhere."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinat_triton.commands.options import (
    ARCHITECTURES,
    BATCH_HELP,
    DTYPES,
    LAYERS_HELP,
    add_out,
    check_dims,
    check_names,
    check_positive,
    find_device,
    find_layers,
    split,
)
from dinat_triton.commands.tables import table
from dinat_triton.files import check_target, replacing

if TYPE_CHECKING:
    from dinat_triton.layers import Layer
    from dinat_triton.offline.targets import Target
    from dinat_triton.store import Table
    from dinat_triton.tuner.search import Budget, Found, Row

DEFAULT_ARCH = "sm_90"
# By what is tuned: dtype and images.
DEFAULTS = {"cpu": ("float32", 1), "gpu": ("bfloat16", 128)}
CONFIG = ("rows", "chunk", "one", "warps", "stages", "programs", "regs")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", nargs="+", default=["dinat_mini@224"], metavar="LAYERS",
                        help=f"{LAYERS_HELP}; only whole settings also decide for layers that are not named "
                        "(default: dinat_mini@224)")  # fmt: skip
    parser.add_argument("--dtype", help=f"of {', '.join(DTYPES)} (default: bfloat16 on GPUs, float32 on CPUs)")
    parser.add_argument("--dim", type=int, nargs="+", help="head dims (default: each model's own)")
    parser.add_argument("--batch", type=int, help=f"{BATCH_HELP} (default: 128 on GPUs, 1 on CPUs)")
    parser.add_argument("--budget", type=float, default=60, metavar="SECONDS",
                        help="after which the best found so far is kept (default: 60)")  # fmt: skip
    parser.add_argument("--device", help="cuda: kernels on the GPU here; cpu: tiles of the `tiled` backend "
                        "(default: cuda if there is one, else cpu and the model of --arch)")  # fmt: skip
    parser.add_argument("--arch", nargs="+", default=[], metavar="ARCH",
                        help=f"kernels by a model of GPUs elsewhere, of {', '.join(ARCHITECTURES)}; nothing is "
                        f"measured (default without a GPU: {DEFAULT_ARCH})")  # fmt: skip
    add_out(parser, "write the configs as the package ships them, too, as .json; a folder takes several architectures")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="compilers side by side")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")


def run(args: argparse.Namespace) -> int:
    """Returns 1 if the budget was too small for a single layer."""
    from dinat_triton.tuner.search import Budget, shared_out

    budget, reached = Budget(args.budget), False
    for task, share in shared_out(budget, tasks_of(args)):
        search = _tune_tiles if task.what == "cpu" else _tune_kernels
        reached |= bool(search(args, task, share).rows)
    if not reached:
        print("Nothing was tuned: a larger --budget is needed", file=sys.stderr)
    return int(not reached)


@dataclass(frozen=True)
class Task:
    """One thing to tune: `what` is cpu, cuda or an architecture."""

    what: str
    dim: int
    dtype: str
    layers: tuple[Layer, ...]
    whole: bool  # whole settings were named, not single layers


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """Everything that is to be tuned, after all arguments were checked."""
    from dinat_triton.tuner.search import merged

    check_positive(args, "jobs", "batch")
    check_dims(args.dim or [])
    check_names("dtype", [args.dtype] if args.dtype else [], DTYPES)
    whats = _whats(args)
    _check_out(args, [what for what in whats if what != "cpu"])
    whole = not any(":" in word for word in split(args.layers))
    tasks = []
    for what in whats:
        dtype, batch = DEFAULTS["cpu" if what == "cpu" else "gpu"]
        for dim in args.dim or [None]:
            layers = merged(find_layers(args.layers, dim, args.batch or batch))
            for kind in dict.fromkeys(_kind(what, layer) for layer in layers):
                alike = tuple(layer for layer in layers if _kind(what, layer) == kind)
                tasks.append(Task(what, alike[0].dim, args.dtype or dtype, alike, whole))
    return tasks


def _kind(what: str, layer: Layer) -> tuple[int, bool, bool]:
    """A layer's kind: kernels of different kinds share no config."""
    if what == "cpu":
        return layer.dim, layer.has_bias, False
    from dinat_triton.kernels.configs import is_closed

    return layer.dim, layer.has_bias, is_closed(layer.geometry)


def _whats(args: argparse.Namespace) -> list[str]:
    check_names("arch", args.arch, ARCHITECTURES)
    device = find_device(args.device).type
    if args.device is not None and device == "cuda" and args.arch:
        raise ValueError(
            "--arch names GPUs that are elsewhere, and --device cuda the one that is here: give one of them"
        )
    if args.arch and find_spec("triton") is None:
        raise RuntimeError("--arch needs the package triton to compile with, and it is not installed")
    if args.device is None and args.arch:
        return list(args.arch)
    if device == "cuda":
        return ["cuda"]
    if args.device is None and find_spec("triton") is not None:
        return ["cpu", DEFAULT_ARCH]
    return ["cpu", *args.arch]


def _check_out(args: argparse.Namespace, kernels: Sequence[str]) -> None:
    path = args.out
    if path is None:
        return
    if args.dry_run:
        raise ValueError("--dry-run writes nothing, so there is nothing for --out")
    if not kernels:
        raise ValueError("--out takes configs of kernels, and only tiles of the CPU are tuned: give --arch as well")
    if len(kernels) > 1 and not path.is_dir():
        raise ValueError(f"--out must be a folder for {len(kernels)} architectures, got {path}")
    for what in kernels:
        check_target(_export(path, _target(what).name), endings=[".json"], force=args.force)


def _export(path: Path, arch: str) -> Path:
    """The file for an architecture: the one that was named, or one in the folder that was."""
    return path / f"{arch}.json" if path.is_dir() else path


def _target(what: str) -> Target:
    """The GPU that is here, or the one that an architecture's name stands for."""
    import torch

    from dinat_triton.kernels.configs import architecture_of
    from dinat_triton.offline.targets import find_target, target_of

    if what != "cuda":
        return find_target(what)
    return target_of(architecture_of(torch.device("cuda", torch.cuda.current_device())))


def _tune_kernels(args: argparse.Namespace, task: Task, budget: Budget) -> Found:
    import torch

    from dinat_triton import store
    from dinat_triton.kernels import configs
    from dinat_triton.tuner.kernel_search import shipped, tune_kernels

    target = _target(task.what)
    if task.what == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        name, source = target.device, f"measured on {target.device}"
        how = "measured here, every config checked against float64"
    else:
        device = None
        name, source = target.name, "offline inspection"
        how = f"MODELLED after the {target.gpu}: no GPU was used, and no result checked"
    entries = configs.user_table(name)
    if not args.dry_run:
        entries.check_writable()
    print(f"{target.name}, {task.dtype}, head dim {task.dim}: {how}.", flush=True)
    options: dict[str, Any] = {"general": task.whole, "jobs": args.jobs}
    found, (seen, of) = tune_kernels(task.layers, getattr(torch, task.dtype), target, budget, device, **options)
    if seen < of:
        found.wrong.append(f"the budget was over when {seen} of {of} configs of layers were looked at")
    print(report(found, CONFIG))
    about = _about(source, "triton", "torch")
    _keep(args, found, entries, about)
    if args.out is not None:
        path = _export(args.out, target.name)
        with replacing(path) as beside:
            beside.write_text(store.dump(about, "configs", shipped(entries.read())), encoding="utf-8")
        print(f"wrote {path}")
    return found


def _tune_tiles(args: argparse.Namespace, task: Task, budget: Budget) -> Found:
    import torch

    from dinat_triton import store, tiled
    from dinat_triton.tuner.tile_search import report_on_model, tune_tiles

    entries = tiled.user_tiles()
    if not args.dry_run:
        entries.check_writable()
    print(
        f"{store.cpu_name()}, {torch.get_num_threads()} threads, {task.dtype}, head dim {task.dim}: tiles of the "
        "`tiled` backend, measured here, every tile checked against float64.",
        flush=True,
    )
    found, samples = tune_tiles(task.layers, getattr(torch, task.dtype), budget)
    print(report(found, ["tile"]))
    print(report_on_model(samples) + "\n")
    _keep(args, found, entries, _about(f"measured on {store.cpu_name()}", "torch"))
    return found


def _keep(args: argparse.Namespace, found: Found, entries: Table, about: Mapping[str, Any]) -> None:
    """Puts what was found into the user's table, and says so."""
    if args.dry_run:
        print("nothing was written: this was a dry run")
    elif found.entries:
        print(f"wrote {entries.update(found.entries, **about)}")


def _about(source: str, *distributions: str) -> Mapping[str, Any]:
    """Head of a table: its source, versions and date."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"source": source, "versions": {name: version(name) for name in distributions}, "date": today}


def report(found: Found, columns: Sequence[str]) -> str:
    """The results as a table; what was rejected; what the budget left out.

    Args:
        found: The results.
        columns: What a choice consists of.
    """
    rows = []
    for row in sorted(found.rows, key=lambda row: (row.layer.name, row.layer.batch)):
        choice = ["x".join(map(str, row.choice))] if isinstance(row.choice, tuple) else map(str, astuple(row.choice))
        rows.append([f"{row.layer} {row.name}", *_compared(row), *choice, "new" if row.changed else ""])
    lines = [table(["layer", "before us", "after us", "ratio", *columns, ""], rows)] if rows else []
    lines += [f"! {each}" for each in found.wrong]
    if found.unreached:
        lines.append(f"! the budget was over before {', '.join(map(str, found.unreached))}")
    timed = [row for row in found.rows if row.before < inf]
    before, after = (sum(row.layer.count * getattr(row, when) for row in timed) for when in ("before", "after"))
    if after:
        lines.append(f"All of it, each layer as often as it was named: {before / after:.3f}x as fast as before.\n")
    return "\n".join(lines)


def _compared(row: Row) -> list[str]:
    after = f"{1e6 * row.after:.1f}"
    return (
        ["rejected", after, "-"]
        if row.before == inf
        else [f"{1e6 * row.before:.1f}", after, f"{row.before / row.after:.2f}"]
    )
