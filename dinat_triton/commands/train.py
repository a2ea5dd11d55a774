"""`dinat-triton train`: trains or fine-tunes a model on images, on any number of devices."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dinat_triton.files import check_target

if TYPE_CHECKING:
    from dinat_triton.training.loop import Run

TERMINATED = 75  # "try again later", as sysexits.h has it


def configure(parser: argparse.ArgumentParser) -> None:
    from dinat_triton.training import recipe

    parser.add_argument("data", nargs="?", default=argparse.SUPPRESS, metavar="DATA",
                        help=recipe.FIELDS["data"]["text"])  # fmt: skip
    parser.add_argument("--recipe", metavar="NAME|FILE", help=f"one of {', '.join(recipe.names())}, or a YAML file, "
                        "such as a run's args.yaml (default: digits for those, else imagenet)")  # fmt: skip
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("out"), metavar="RUN", help="folder to write to (default: out)"
    )
    parser.add_argument("--resume", metavar="auto|FILE", help="auto: go on with the run in --out from its last "
                        "checkpoint, if there is one; or from a checkpoint file")  # fmt: skip
    options = parser.add_argument_group("options that a recipe sets")
    recipe.add_options(options, [name for name in recipe.FIELDS if name != "data"])
    parser.epilog = f"exit codes: 0 done; 2 wrong use or a failure; {TERMINATED} SIGTERM came and --resume auto goes on"


def run(args: argparse.Namespace) -> int:
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        run = prepare(args)
    except AssertionError as error:
        raise ValueError(f"an option is refused by timm: {error}") from error
    except (ValueError, TypeError, RuntimeError, OSError, ImportError):
        if is_first:
            raise
        return 2  # as in all processes: the first one says why
    from dinat_triton.training import report
    from dinat_triton.training.loop import Terminated

    try:
        run.go()
    except Terminated:
        if is_first:
            print(f"terminated after step {run.engine.done}; --resume auto goes on from there")
        return TERMINATED
    run.accelerator.end_training()
    if is_first:
        best = report.best(run.history)
        print(f"best: {best['top1']:.2f} % top-1 in epoch {best['epoch']:.0f}, {args.out / 'best.safetensors'}")
        print(f"wrote last.safetensors, best.safetensors, metrics.csv, curve.png and args.yaml to {args.out}")
    return 0


def prepare(args: argparse.Namespace) -> Run:
    """Checks everything, and builds the run."""
    try:
        import accelerate  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError("training needs accelerate: pip install 'dinat-triton[train]'") from error
    from dinat_triton.training import checkpoint, data, recipe
    from dinat_triton.training.engine import accelerator_for
    from dinat_triton.training.loop import Run
    from dinat_triton.training.model import build

    overrides = recipe.given(args)
    name = args.recipe or ("digits" if overrides.get("data", "digits") == "digits" else "imagenet")
    sets = recipe.read(name)
    options = recipe.Recipe(**sets | overrides)
    folder, kept = args.out, args.out / "args.yaml"
    check_target(kept, force=True, folder=True)
    if kept.exists() and not args.resume:
        raise ValueError(f"{folder} holds a run: --resume auto goes on with it, or name another --out")
    start = (checkpoint.latest(folder) if args.resume == "auto" else Path(args.resume)) if args.resume else None
    if args.resume and kept.exists():
        recipe.check_same(options, kept)
    state = checkpoint.read(start) if start else None

    accelerator = accelerator_for(options, project_dir=folder)
    train, val, classes = data.load(options)
    per_step = options.batch_size * options.grad_accum_steps
    batch = state["batch"] if state else per_step * accelerator.num_processes
    data.check_batch(batch, len(train), accelerator.num_processes, options)
    model = build(options, len(classes))
    run = Run(options, folder, accelerator, model, train, val, batch)
    if state:
        run.load(state)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        checkpoint.remove_unfinished(folder)
        folder.mkdir(parents=True, exist_ok=True)
        recipe.save(options, kept)
        print(recipe.report(sets, overrides, name))
        print(
            f"{options.model} of {sum(p.numel() for p in model.parameters()):,} parameters; {len(train)} images of "
            f"{len(classes)} classes to learn, {len(val)} to validate; {batch} a step, {run.steps} steps an epoch, "
            f"{accelerator.num_processes} x {accelerator.device.type}" + (f"; from {start}" if start else "")
        )
    if options.log_with:
        accelerator.init_trackers("dinat-triton", config={key: str(value) for key, value in vars(options).items()})
    return run
