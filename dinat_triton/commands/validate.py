"""`dinat-triton validate`: accuracy of a model on labelled images."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinat_triton.files import check_target, replacing

if TYPE_CHECKING:
    from dinat_triton.training.evaluate import Scores

OPTIONS = (
    "model", "model_kwargs", "weights", "data_dir", "val_split", "img_size", "mean", "std", "interpolation",
    "crop_pct", "batch_size", "workers", "max_broken", "amp", "amp_dtype", "channels_last", "torchcompile", "device",
)  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    from dinat_triton.training import recipe

    parser.add_argument("data", nargs="?", default=argparse.SUPPRESS, metavar="DATA",
                        help=recipe.FIELDS["data"]["text"])  # fmt: skip
    parser.add_argument("--trained", type=Path, metavar="RUN", help="a folder of `dinat-triton train`: its "
                        "model, its best weights and the images it validated on, unless told otherwise")  # fmt: skip
    parser.add_argument("--crop", dest="crop_mode", choices=("center", "squash", "border"), default=argparse.SUPPRESS,
                        help="crop the centre, as the authors evaluate, or squash all of it, as the hub's "
                        "preprocessor does")  # fmt: skip
    parser.add_argument("--per-class", type=Path, metavar="FILE.csv", help="write the accuracy of each class")
    parser.add_argument("--real-labels", action="store_true", help="also ImageNet's reassessed labels (ReaL)")
    parser.add_argument("--force", action="store_true", help="replace files that are there already")
    recipe.add_options(parser, OPTIONS)


def run(args: argparse.Namespace) -> int:
    try:
        from dinat_triton.training import data, recipe
        from dinat_triton.training.engine import accelerator_for
        from dinat_triton.training.evaluate import evaluate
    except ModuleNotFoundError as error:
        raise ImportError(f"validation needs {error.name}: pip install 'dinat-triton[train]'") from error
    from dinat_triton.training.model import build

    if args.per_class is not None:
        check_target(args.per_class, endings=(".csv",), force=args.force)
    sets: dict[str, Any] = {"weights": "hub"}
    if args.trained is not None:
        sets = recipe.read(str(args.trained / "args.yaml")) | {"weights": str(args.trained / "best.safetensors")}
    options = recipe.Recipe(**sets | recipe.given(args))
    accelerator = accelerator_for(options)
    samples, classes = data.load_validation(options) if args.trained is None else data.load(options)[1:]
    model = build(options, None if options.weights == "hub" else len(classes), new_classifier=False)
    if model.num_classes != len(classes):
        raise ValueError(
            f"{options.model} tells {model.num_classes} classes apart, and {options.data} has {len(classes)}"
        )
    config = data.data_config(options, model)
    model = accelerator.prepare_model(model.to(accelerator.device), evaluation_mode=True)
    if options.torchcompile:
        model.compile()
    batch = options.batch_size * accelerator.num_processes
    loader = accelerator.prepare(data.validation_loader(samples, options, config, batch))
    real = _real_labels(samples) if args.real_labels else None
    scores = evaluate(model, loader, accelerator, lambda logits, _: real and real.add_result(logits))
    samples.check()
    if accelerator.is_main_process:
        _report(scores, options.model, accelerator.device.type, samples)
        if real is not None:
            print(f"ReaL labels: top-1 {real.get_accuracy(1):.2f} %, top-5 {real.get_accuracy(5):.2f} %")
        if args.per_class is not None:
            _write_classes(scores, classes, args.per_class)
    accelerator.end_training()
    return 0


def _real_labels(samples: Any) -> Any:
    from timm.data import RealLabelsImagenet

    try:
        return RealLabelsImagenet(samples.images.filenames(basename=True))
    except AssertionError as error:
        raise ValueError(
            f"--real-labels are of ImageNet's 50000 validation images, got {len(samples)} images"
        ) from error


def _report(scores: Scores, model: str, device: str, samples: Any) -> None:
    import torch

    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource

        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    broken = int(samples.broken.sum())
    print(
        f"{model} on {int(scores.count.sum())} images: top-1 {scores.top1:.2f} %, top-5 {scores.top5:.2f} %, "
        f"loss {scores.loss:.4f}, {scores.images_per_s:.0f} images/s, peak memory {peak / 2**20:.0f} MiB"
        + (f"; {broken} could not be read" if broken else "")
    )


def _write_classes(scores: Scores, classes: list[str], path: Path) -> None:
    with replacing(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "images", "top1"])
        for name, count, correct in zip(classes, scores.count.tolist(), scores.correct.tolist(), strict=True):
            writer.writerow([name, int(count), f"{100 * correct / count:.2f}" if count else ""])
    print(f"wrote {path}")
