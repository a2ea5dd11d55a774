"""`dinat-triton tune`: the fastest tiles and launch options for this machine, or for a GPU that is elsewhere."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any

from dinat_triton.commands.inspect import ARCHITECTURES, DTYPES

DEFAULT_ARCH = "sm_90"
# By what is tuned: dtype and images in a batch; maps of detection are large, and come an eighth as many at a time.
DEFAULTS = {"cpu": ("float32", 1), "gpu": ("bfloat16", 128)}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", nargs="+", default=["dinat_mini@224"], metavar="MODEL@SETTING[:LAYER]",
                        help="what to tune, such as dinat_mini@224, coco, or dinat_large@384:24x24*; only whole "
                        "settings also decide for layers that are not named (default: dinat_mini@224)")  # fmt: skip
    parser.add_argument("--dtype", help=f"of {', '.join(DTYPES)} (default: bfloat16 on GPUs, float32 on CPUs)")
    parser.add_argument("--dim", type=int, nargs="+", default=[32], help="head dims (default: 32)")
    parser.add_argument("--batch", type=int, help="images at a time (default: 128 on GPUs, 1 on CPUs)")
    parser.add_argument("--budget", type=float, default=60, metavar="SECONDS",
                        help="after which the best found so far is kept (default: 60)")  # fmt: skip
    parser.add_argument("--device", help="cuda: kernels on the GPU here; cpu: tiles of the `tiled` backend "
                        "(default: cuda if there is one, else cpu and the model of --arch)")  # fmt: skip
    parser.add_argument("--arch", nargs="+", metavar="ARCH",
                        help=f"kernels by a model of GPUs elsewhere, of {', '.join(ARCHITECTURES)}; nothing is "
                        f"measured (default without a GPU: {DEFAULT_ARCH})")  # fmt: skip
    parser.add_argument("--export", type=Path, metavar="FILE",
                        help="write the configs as the package ships them; a folder takes more than one "
                        "architecture")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="compilers side by side")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")


def run(args: argparse.Namespace) -> int:
    """Returns 1 if the budget was too small for a single layer."""
    from dinat_triton.tuner.search import Budget

    budget = Budget(args.budget)
    parts = parts_of(args)
    reached = False
    for number, part in enumerate(parts):
        share = budget.share(1 / (len(parts) - number))
        reached |= _tune_tiles(args, part, share) if part.what == "cpu" else _tune_kernels(args, part, share)
    if not reached:
        print("Nothing was tuned: a larger --budget is needed", file=sys.stderr)
    return int(not reached)


@dataclass(frozen=True)
class Part:
    """One thing to tune: `what` is cpu, cuda or an architecture."""

    what: str
    dim: int
    dtype: str
    works: tuple[Any, ...]
    whole: bool  # whole settings were named, not single layers


def parts_of(args: argparse.Namespace) -> list[Part]:
    """What there is to do, after all arguments were checked."""
    from dinat_triton.bench.selection import check_names, find_layers, split
    from dinat_triton.tuner.search import Work, merged

    for name in ("jobs", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if not all(1 <= dim <= 256 for dim in args.dim):
        raise ValueError(f"--dim must be between 1 and 256, got {' '.join(map(str, args.dim))}")
    check_names("dtype", [args.dtype] if args.dtype else [], DTYPES)
    whats = _whats(args)
    layers = find_layers(args.layers)
    whole = not any(":" in word for word in split(args.layers))
    parts = []
    for what in whats:
        default_dtype, default_batch = DEFAULTS["cpu" if what == "cpu" else "gpu"]
        batch = args.batch or default_batch
        for dim in args.dim:
            works = merged(
                Work(
                    replace(layer, dim=dim), max(1, batch // (8 if layer.name.startswith("coco/") else 1)), layer.count
                )
                for _, layer in layers
            )
            parts.append(Part(what, dim, args.dtype or default_dtype, tuple(works), whole))
    _check_export(args, [what for what in whats if what != "cpu"])
    return parts


def _whats(args: argparse.Namespace) -> list[str]:
    from dinat_triton.bench.selection import check_names, find_device

    check_names("arch", args.arch or [], ARCHITECTURES)
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
    return ["cpu", *(args.arch or [])]


def _check_export(args: argparse.Namespace, kernels: Sequence[str]) -> None:
    path = args.export
    if path is None:
        return
    if args.dry_run:
        raise ValueError("--dry-run writes nothing, so there is nothing to --export")
    if not kernels:
        raise ValueError("--export writes configs of kernels, and only tiles of the CPU are tuned: give --arch as well")
    if len(kernels) > 1 and not path.is_dir():
        raise ValueError(f"--export must be a folder for {len(kernels)} architectures, got {path}")
    if not path.is_dir() and not path.resolve().parent.is_dir():
        raise ValueError(f"--export must name a file in a folder that exists, got {path}")


# The kernels


def _tune_kernels(args: argparse.Namespace, part: Part, budget: Any) -> bool:
    import torch

    from dinat_triton.kernels import configs, prepare
    from dinat_triton.offline import targets
    from dinat_triton.tuner import configs as tune_kernels

    measured = part.what == "cuda"
    dtype = getattr(torch, part.dtype)
    options = {"general": part.whole, "jobs": args.jobs}
    if measured:
        device = torch.device("cuda", torch.cuda.current_device())
        architecture = configs.architecture_of(device)
        arch, name, source = architecture.name, architecture.device, f"measured on {architecture.device}"
        how = "measured here, every config checked against float64"
    else:
        target = targets.find_target(part.what)
        arch = name = part.what
        source = "offline inspection"
        how = f"MODELLED after the {target.gpu}: no GPU was used, and no result checked"
    table = configs.user_table(name)
    if not args.dry_run:
        table.check_writable()
    print(f"{arch}, {part.dtype}, head dim {part.dim}: {how}.", flush=True)
    if measured:
        found = tune_kernels.tune_measured(part.works, dtype, device, architecture, budget, **options)
    else:
        found = tune_kernels.tune_modelled(part.works, dtype, target, budget, **options)
    print(kernel_report(found, part))
    if args.dry_run:
        return bool(found.rows)
    versions = {"triton": _version("triton"), "torch": torch.__version__}
    about = {"source": source, "versions": versions, "date": _today()}
    if found.entries:
        _written(table.update(found.entries, **about))
        configs.forget_tables()
        prepare.forget()
    if args.export is not None:
        _export(args.export, arch, tune_kernels.shipped(configs.load_user_table(name)), about, measured)
    return bool(found.rows)


def kernel_report(found: Any, part: Part) -> str:
    """What was found, as a table; what was rejected; what the budget left out."""
    from dinat_triton.bench.harness import table

    rows = [
        [f"{row.work.label} {row.name}", *_compared(1e6 * row.before, 1e6 * row.after, 1),
         *map(str, asdict(row.config).values()), "own" if row.own else ""]
        for row in sorted(found.rows, key=lambda row: part.works.index(row.work))
    ]  # fmt: skip
    configs = ["rows", "chunk", "one", "warps", "stages", "programs", "regs"]
    header = ["layer", "before us", "after us", "ratio", *configs, ""]
    unseen, wanted = found.unseen
    lines = [table(header, rows)] if rows else []
    lines += [f"! rejected: {each}" for each in found.wrong]
    if unseen:
        lines.append(f"! the budget was over when {wanted - unseen} of {wanted} configs of layers were looked at")
    if found.unreached:
        lines.append(f"! the budget was over before {', '.join(work.label for work in found.unreached)}")
    return "\n".join([*lines, _total(found.rows)])


def _export(path: Path, arch: str, entries: Mapping[str, Any], about: Mapping[str, Any], measured: bool) -> None:
    """Writes a table as it ships; in a folder under the architecture's name, and those of its like."""
    from dinat_triton import store
    from dinat_triton.tuner.configs import ALIKE

    names = [arch] if measured else [arch, *ALIKE.get(arch, ())]
    for file in [path / f"{name}.json" for name in names] if path.is_dir() else [path]:
        file.write_text(store.dump(about, "configs", entries), encoding="utf-8")
        _written(file)


# The tiles


def _tune_tiles(args: argparse.Namespace, part: Part, budget: Any) -> bool:
    import torch

    from dinat_triton import store, tiled
    from dinat_triton.tuner import tiles as tune_tiles

    table = tiled.user_tiles()
    if not args.dry_run:
        table.check_writable()
    threads = torch.get_num_threads()
    print(
        f"{store.cpu_name()}, {threads} threads, {part.dtype}, head dim {part.dim}: tiles of the `tiled` backend, "
        "measured here, every tile checked against float64.",
        flush=True,
    )
    found = tune_tiles.tune_tiles(part.works, getattr(torch, part.dtype), budget)
    print(tile_report(found))
    print(tune_tiles.report_on_model(found.samples) + "\n")
    if found.entries and not args.dry_run:
        about = {
            "source": f"measured on {store.cpu_name()}",
            "versions": {"torch": torch.__version__},
            "date": _today(),
        }
        _written(table.update(found.entries, **about))
        tiled.forget_tiles()
    return bool(found.rows)


def tile_report(found: Any) -> str:
    from dinat_triton.bench.harness import table

    rows = [
        [row.work.label, *_compared(1e3 * row.before[0], 1e3 * row.after[0], 3),
         *_compared(1e3 * row.before[1], 1e3 * row.after[1], 3), "x".join(map(str, row.tile)),
         "new" if row.changed else ""]
        for row in found.rows
    ]  # fmt: skip
    header = ["layer", "forward ms", "after", "ratio", "+ backward ms", "after", "ratio", "tile", ""]
    lines = [table(header, rows)] if rows else []
    lines += [f"! rejected: {each}" for each in found.wrong]
    if found.unreached:
        lines.append(f"! the budget was over before {', '.join(work.label for work in found.unreached)}")
    return "\n".join(lines)


# Both


def _compared(before: float, after: float, digits: int) -> list[str]:
    if before == inf:
        return ["rejected", f"{after:.{digits}f}", "-"]
    return [f"{before:.{digits}f}", f"{after:.{digits}f}", f"{before / after:.2f}"]


def _total(rows: Sequence[Any]) -> str:
    rows = [row for row in rows if row.before < inf]
    before, after = (sum(row.work.weight * getattr(row, when) for row in rows) for when in ("before", "after"))
    return (
        f"All of it, each layer as often as it was named: {before / after:.3f}x as fast as before.\n" if after else ""
    )


def _written(path: Path) -> None:
    print(f"Written to {path}")


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _version(distribution: str) -> str:
    from importlib.metadata import version

    return version(distribution)
