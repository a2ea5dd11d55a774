"""`dinat-triton roofline`: every attention layer against what the machine allows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from dinat_triton.bench.roofline import Results
    from dinat_triton.offline.targets import Target

LAYERS = "dinat_mini@224"


def configure(parser: argparse.ArgumentParser) -> None:
    from dinat_triton.bench.selection import LAYERS_HELP

    parser.add_argument("--layers", nargs="+", default=[LAYERS], metavar="LAYERS",
                        help=f"{LAYERS_HELP} (default: {LAYERS})")  # fmt: skip
    parser.add_argument("--device", metavar="DEVICE",
                        help="cpu or cuda: whose plans are taken, and whose ceilings measured unless a file has them "
                        "(default: that of the results, or a GPU if there is one)")  # fmt: skip
    parser.add_argument("--arch", help="plan for a GPU that need not be here, such as sm_90; its ceilings are the "
                        "vendor's unless a file has measured ones")  # fmt: skip
    parser.add_argument("--results", type=Path, nargs="+", default=[], metavar="FILE",
                        help="times of ours and of the peers, and ceilings, as `dinat-triton bench` stores them; "
                        "without any, layers are drawn at their bounds")  # fmt: skip
    parser.add_argument("--backward", action="store_true",
                        help="the backward; on a CPU, where it is not timed alone, forward and backward")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="(default: float32 on a CPU, bfloat16 on a GPU)")  # fmt: skip
    parser.add_argument("--batch", type=int, metavar="N",
                        help="images (default: 1 on a CPU, 128 on a GPU; coco: an eighth)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw the figure: .png, .svg or .pdf")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that the figure shows")


def run(args: argparse.Namespace) -> int:
    from dinat_triton.bench import harness, outputs, roofline, selection

    if args.batch is not None and args.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {args.batch}")
    outputs.check_outputs(args.out, args.json)
    layers = selection.find_layers(args.layers)
    results = roofline.Results.load(args.results) if args.results else None
    device, target = choose_device(args, results)
    gpu = device.type == "cuda"
    pass_ = roofline.pass_of(gpu, args.backward)
    dtype = args.dtype or ("bfloat16" if gpu else "float32")
    points = roofline.points_of(layers, pass_, dtype, args.batch, device, target)
    if results is not None:
        roofline.add_timings(points, results)
    ceilings = choose_ceilings(results, device, target)
    print(roofline.report(points, ceilings))
    if args.json is not None:
        environment = harness.environment("cpu" if target else device) if results is None else results.environment
        records = [record for point in points for record in point.records()]
        harness.save(args.json, environment, records, ceilings=ceilings)
    if args.out is not None:
        from dinat_triton import plots
        from dinat_triton.bench import figures

        plots.save(figures.plot_roofline(points, ceilings), args.out)
    return 0


def choose_device(args: argparse.Namespace, results: Results | None) -> tuple[torch.device, Target | None]:
    """Whose plans are taken: a device that is here, or an architecture."""
    import torch

    from dinat_triton.bench.selection import find_device

    device = args.device
    if results is not None:
        device = device or results.device_type
        for option, type_ in (("device", args.device), ("arch", args.arch and "cuda")):
            if type_ and torch.device(type_).type != results.device_type:
                raise ValueError(f"--{option} {getattr(args, option)} does not go with results of {results.device}")
    if args.arch is not None:
        from dinat_triton.offline.targets import find_target

        if args.device == "cpu":
            raise ValueError(f"--arch {args.arch} is a GPU's, and --device says cpu: leave one of them out")
        return torch.device("cuda"), find_target(args.arch)
    if results is not None and results.device_type == "cuda" and not results.is_of_here:
        raise ValueError(f"the results are of {results.device}, which is not here: name its architecture with --arch")
    return find_device(device), None


def choose_ceilings(results: Results | None, device: torch.device, target: Target | None) -> dict[str, Any]:
    """Those of the results, the vendor's, or measured now; never those of one machine for the times of another."""
    from dinat_triton.bench import harness
    from dinat_triton.bench.ceilings import ceilings_of, measure_ceilings

    if results is not None and results.ceilings is not None:
        return results.ceilings
    if target is not None:
        return ceilings_of(target.name)
    if results is not None and not results.is_of_here:
        threads = results.environment["threads"]
        raise ValueError(
            f"{', '.join(results.names)} holds no ceilings, and they cannot be measured here: its times are of "
            f"{results.device} with {threads} threads"
        )
    harness.prepare_process()
    return measure_ceilings(device)
