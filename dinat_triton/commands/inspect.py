"""`dinat-triton inspect`: the Triton kernels compiled for any GPU on any machine, and judged."""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
DTYPES = ("bfloat16", "float16", "float32")
PASSES = ("forward", "closed_backward", "query_backward", "key_backward")
HELPERS = ("table", "sum_programs", "fold_bias")
LAYERS = ("dinat_mini@224", "dinat_mini@384", "dinat_mini@coco")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", default=["sm_90"], choices=ARCHITECTURES, metavar="ARCH",
                        help=f"of {', '.join(ARCHITECTURES)} (default: sm_90)")  # fmt: skip
    parser.add_argument("--dim", type=int, nargs="+", default=[32], help="head dims (default: 32)")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=DTYPES, metavar="DTYPE",
                        help=f"of {', '.join(DTYPES)} (default: bfloat16)")  # fmt: skip
    parser.add_argument("--pass", dest="passes", nargs="+", choices=(*PASSES, *HELPERS), metavar="PASS",
                        help=f"only these kernels, of {', '.join((*PASSES, *HELPERS))}")  # fmt: skip
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), metavar="MODEL@SETTING",
                        help=f"whose layers the kernels are compiled for (default: {' '.join(LAYERS)})")  # fmt: skip
    parser.add_argument("--batch", type=int, default=128, help="images in a batch (default: 128; coco: an eighth)")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="compilers side by side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found")


def run(args: argparse.Namespace) -> int:
    """Returns 1 if a kernel must not ship."""
    if args.batch < 1 or args.jobs < 1 or not all(1 <= dim <= 256 for dim in args.dim):
        raise ValueError("--batch and --jobs must be at least 1, --dim between 1 and 256")
    studies, failed = [], False
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for arch in args.arch:
            for dtype in args.dtype:
                for dim in args.dim:
                    study = _study(args, arch, dtype, dim, pool)
                    studies.append(study)
                    failed |= any(kernel["complaints"] for kernel in study["kernels"])
                    print(_report(study), flush=True)
    if args.json is not None:
        from dinat_triton.version import __version__

        args.json.write_text(json.dumps({"version": __version__, "studies": studies}, indent=1) + "\n")
    return int(failed)


def _study(args: argparse.Namespace, arch: str, dtype: str, dim: int, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Compiles what the layers launch, each kernel once."""
    import torch
    import triton

    from dinat_triton.layers import layers_of
    from dinat_triton.offline import estimate, inspect
    from dinat_triton.offline.targets import find_target

    target, torch_dtype = find_target(arch), getattr(torch, dtype)
    layers = [(name, layer) for name in args.layers for layer in layers_of(name, dim)]
    launches, steps = [], []
    for name, layer in layers:
        batch = max(1, args.batch // 8) if name.endswith("coco") else args.batch
        launched, main_steps = estimate.record(layer, target, torch_dtype, batch)
        launches += launched
        steps.append(main_steps)
    wanted = [x for x in inspect.distinct(launches) if not args.passes or x.name in args.passes]
    reports = {}
    for launch, report in zip(wanted, pool.map(inspect.inspect, wanted, [target] * len(wanted)), strict=True):
        reports[launch] = report
        _progress(f"{arch} {dtype} {dim}: {len(reports)} of {len(wanted)} kernels")
    _progress("")
    estimates = [
        {"model": name} | found
        for (name, _), each in zip(layers, steps, strict=True)
        if all(step.launch in reports for step in each)
        for found in estimate.estimate(each, reports, target)
    ]
    return {
        "arch": arch,
        "gpu": target.gpu,
        "dtype": dtype,
        "dim": dim,
        "versions": {"triton": triton.__version__, "torch": torch.__version__},
        "kernels": [report.to_dict() for report in reports.values()],
        "estimates": estimates,
    }


def _report(study: dict[str, Any]) -> str:
    head = f"{study['arch']} ({study['gpu']}), {study['dtype']}, head dim {study['dim']}"
    kernels = _table(
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
        parts.append(_table(["layer", "us", "at best", "floor", "scores", "binds"], rows))
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
    size = f" {constants['ROWS']}x{constants['CHUNK']}" if "ROWS" in constants else ""
    flags = [k.lower() for k in ("ONE_CHUNK", "ALL_CHUNKS", "GRAD_QUERY", "GRAD_BIAS") if constants.get(k)]
    return f"{name}{size} {' '.join(flags)} w{kernel['num_warps']} s{kernel['num_stages']}".replace("  ", " ")


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
             for row in (header, ["-" * w for w in widths], *rows)]  # fmt: skip
    return "\n".join(line.rstrip() for line in lines)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
