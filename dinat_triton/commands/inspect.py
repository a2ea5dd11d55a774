"""`dinat-triton inspect`: the Triton kernels compiled for any GPU on any machine, and judged."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from dinat_triton.commands.options import (
    ARCHITECTURES,
    BATCH_HELP,
    DTYPES,
    add_out,
    check_dims,
    check_names,
    check_positive,
    find_layers,
)
from dinat_triton.commands.tables import table
from dinat_triton.files import check_target, replacing
from dinat_triton.passes import Pass

KERNELS = (*Pass, "table", "sum_programs", "fold_bias")
LAYERS = ("dinat_mini@224", "dinat_mini@384", "dinat_mini@coco")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", default=["sm_90"], metavar="ARCH",
                        help=f"of {', '.join(ARCHITECTURES)} (default: sm_90)")  # fmt: skip
    parser.add_argument("--dim", type=int, nargs="+", help="head dims (default: each model's own)")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], metavar="DTYPE",
                        help=f"of {', '.join(DTYPES)} (default: bfloat16)")  # fmt: skip
    parser.add_argument("--pass", dest="passes", nargs="+", default=list(KERNELS), metavar="PASS",
                        help=f"only these kernels, of {', '.join(KERNELS)}")  # fmt: skip
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), metavar="LAYERS",
                        help=f"whose layers the kernels are compiled for (default: {' '.join(LAYERS)})")  # fmt: skip
    parser.add_argument("--batch", type=int, default=128, help=f"{BATCH_HELP} (default: 128)")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="compilers side by side")
    add_out(parser, "write everything found, as .json")


def run(args: argparse.Namespace) -> int:
    """Returns 1 if a kernel must not ship."""
    check_positive(args, "batch", "jobs")
    check_dims(args.dim or [])
    for kind, names, known in (("arch", args.arch, ARCHITECTURES), ("dtype", args.dtype, DTYPES),
                               ("pass", args.passes, KERNELS)):  # fmt: skip
        check_names(kind, names, known)
    if args.out is not None:
        check_target(args.out, endings=[".json"], force=args.force)
    layers = {dim: find_layers(args.layers, dim, args.batch) for dim in args.dim or [None]}
    studies = []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        each: Callable[..., Any] = pool.map if args.jobs > 1 else map
        for arch in args.arch:
            for dtype in args.dtype:
                for chosen in layers.values():
                    studies.append(_study(arch, dtype, chosen, args.passes, each))
                    print(_report(studies[-1]), flush=True)
    if args.out is not None:
        from dinat_triton.version import __version__

        with replacing(args.out) as beside:
            beside.write_text(json.dumps({"version": __version__, "studies": studies}, indent=1) + "\n")
        print(f"wrote {args.out}")
    return int(any(kernel["complaints"] for study in studies for kernel in study["kernels"]))


def _study(arch: str, dtype: str, layers: list[Any], kernels: list[str], each: Callable[..., Any]) -> dict[str, Any]:
    """Compiles the launches of the layers, each kernel once."""
    import torch
    import triton
    from tqdm import tqdm

    from dinat_triton.offline.estimate import estimate, record
    from dinat_triton.offline.inspect import inspect
    from dinat_triton.offline.targets import find_target

    target = find_target(arch)
    recorded = [record(layer, target, getattr(torch, dtype)) for layer in layers]
    wanted = dict.fromkeys(variant for variants, _ in recorded for variant in variants if variant.name in kernels)
    found = tqdm(each(inspect, wanted, [target] * len(wanted)), f"{arch} {dtype}", len(wanted), disable=None)
    reports = dict(zip(wanted, found, strict=True))
    estimates = [
        estimated
        for _, steps in recorded
        if all(step.variant in reports for step in steps)
        for estimated in estimate(steps, reports, target)
    ]
    return {
        "arch": arch,
        "gpu": target.gpu,
        "dtype": dtype,
        "dim": layers[0].dim,
        "versions": {"triton": triton.__version__, "torch": torch.__version__},
        "kernels": [report.to_dict() for report in reports.values()],
        "estimates": estimates,
    }


def _report(study: dict[str, Any]) -> str:
    head = f"{study['arch']} ({study['gpu']}), {study['dtype']}, head dim {study['dim']}"
    kernels = table(
        ["kernel", "regs", "spills", "shared", "matrix", "exps", "expected", "loads", "loop", "around", "fit"],
        [_kernel_row(kernel) for kernel in study["kernels"]],
    )
    parts = [head, kernels]
    parts += [f"! {_title(k)} {complaint}" for k in study["kernels"] for complaint in k["complaints"]]
    if study["estimates"]:
        rows = [
            [f"{e['layer']} h{e['heads']} b{e['batch']} {e['pass']}", f"{e['us']:.1f}", f"{e['best_us']:.1f}",
             f"{e['floor_us']:.1f}", f"{e['scores_per_query']:.0f}", ", ".join(e["binds"])]
            for e in study["estimates"]
        ]  # fmt: skip
        parts += ["", "Estimates: all limits together, the largest of each kernel alone, the floor of memory", ""]
        parts.append(table(["layer", "us", "at best", "floor", "scores", "binds"], rows))
    return "\n".join(parts) + "\n"


def _kernel_row(kernel: dict[str, Any]) -> list[str]:
    def counts(values: dict[Any, int]) -> str:
        return " ".join(f"{n}x{kind}" for kind, n in values.items()) or "-"

    numbers = (kernel["registers"], kernel["spills"], kernel["shared"])
    exps = (kernel["exps"], f"{kernel['expected_exps']:g}")
    lengths = (kernel["chunk_length"], kernel["item_length"], kernel["programs"])
    return [_title(kernel), *map(str, numbers), counts(kernel["matrix"]), *map(str, exps), counts(kernel["loads"]),
            *map(str, lengths)]  # fmt: skip


def _title(kernel: dict[str, Any]) -> str:
    constants = kernel["constants"]
    name = kernel["kernel"].removesuffix("_kernel")
    size = f" {constants['ROWS']}x{constants['CHUNK']}" if "CHUNK" in constants else ""
    flags = [k.lower() for k in ("ONE_CHUNK", "ALL_CHUNKS", "GRAD_QUERY", "GRAD_BIAS") if constants.get(k)]
    return f"{name}{size} {' '.join(flags)} w{kernel['num_warps']} s{kernel['num_stages']}".replace("  ", " ")
