"""`dinat-triton roofline`: every attention layer against what the machine allows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dinat_triton.commands.options import (
    BATCH_HELP,
    DTYPES,
    LAYERS_HELP,
    add_out,
    check_names,
    check_positive,
    find_device,
    find_layers,
)
from dinat_triton.files import FIGURES, check_target

if TYPE_CHECKING:
    from dinat_triton.bench.harness import Cell, Results

DEFAULT_LAYERS = ("dinat_mini@224",)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, metavar="FILE",
                        help="times and ceilings, as `dinat-triton bench layers` stores them; without them layers are "
                        "drawn at their bounds")  # fmt: skip
    parser.add_argument("--arch", help="plan for a GPU that need not be here, such as sm_90; its ceilings are the "
                        "vendor's (default: measure this machine's)")  # fmt: skip
    parser.add_argument("--layers", nargs="+", default=list(DEFAULT_LAYERS), metavar="LAYERS",
                        help=f"{LAYERS_HELP} (default: {' '.join(DEFAULT_LAYERS)})")  # fmt: skip
    parser.add_argument("--backward", action="store_true",
                        help="the backward; on a CPU, where it is not timed alone, forward and backward")  # fmt: skip
    parser.add_argument("--dtype", help=f"of {', '.join(DTYPES)} (default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument("--batch", type=int, help=f"{BATCH_HELP} (default: 1 on a CPU, 128 on a GPU)")
    add_out(parser, "draw the figure, as .png, .svg or .pdf, or write what it shows, as .json")


def run(args: argparse.Namespace) -> int:
    from dinat_triton.bench import harness, roofline

    _check(args)
    if args.results:
        results = roofline.load(args.results)
        cells = {cell.key for cell in _cells(args, results.environment["device_type"])}
        results.records = [record for record in results.records if record.cell in cells]
        if not results.records:
            raise ValueError(f"{args.results} holds none of the layers that were asked for, at this dtype and batch")
    else:
        results = _bounds(args)
    results = harness.Results("roofline", results.environment, results.records, results.ceilings)
    print(roofline.report(results))
    if args.out is not None:
        _write(results, args.out)
        print(f"wrote {args.out}")
    return 0


def _check(args: argparse.Namespace) -> None:
    check_positive(args, "batch")
    check_names("dtype", [args.dtype] if args.dtype else [], DTYPES)
    if args.out is not None:
        check_target(args.out, endings=[*FIGURES, ".json"], force=args.force)
    if args.results and args.arch:
        raise ValueError("--results and --arch do not go together: a file holds the ceilings of its own device")


def _cells(args: argparse.Namespace, kind: str) -> list[Cell]:
    """The layers that were asked for, in the dtype, batch and pass that were, or that a kind of device has else."""
    from dinat_triton.bench import harness, layers
    from dinat_triton.work import FORWARD

    dtype = args.dtype or layers.DEFAULT_DTYPE[kind]
    pass_ = layers.TRAINING[kind] if args.backward else FORWARD
    found = find_layers(args.layers, batch=args.batch or layers.DEFAULT_BATCH[kind])
    return [harness.Cell(layer, dtype, pass_) for layer in found]


def _bounds(args: argparse.Namespace) -> Results:
    """Layers at their bounds: of a GPU by its vendor's figures, or of this machine by measured ones."""
    from dinat_triton.bench import ceilings, harness, roofline
    from dinat_triton.offline.targets import find_target

    target = find_target(args.arch) if args.arch else None
    device = find_device("cpu" if target else None)
    cells = _cells(args, "cuda" if target else device.type)
    limits = target.ceilings if target else ceilings.measure_ceilings(device)
    records = [roofline.bound(cell, target or device) for cell in cells]
    return harness.Results("roofline", harness.environment(device), records, limits)


def _write(results: Results, path: Path) -> None:
    if path.suffix == ".json":
        results.save(path)
        return
    from dinat_triton import plots
    from dinat_triton.bench import figures

    plots.save(figures.draw(results), path)
