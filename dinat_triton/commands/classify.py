"""`dinat-triton classify`: what images show, with the published weights, a file's, or random ones when told so."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dinat_triton.commands.inputs import HUB, add_weights, build, picture


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="none: a picture drawn on the spot")
    parser.add_argument("--model", default="dinat_mini", help="any registered model (default: dinat_mini)")
    add_weights(parser, HUB)
    parser.add_argument("--or-random", action="store_true", help="go on with random weights where the hub has none")
    parser.add_argument("--top", type=int, default=5, help="classes to show (default: 5)")
    parser.add_argument(
        "--crop",
        choices=("center", "squash"),
        default="center",
        help="crop the centre, as the authors evaluate, or squash all of it, as the hub's preprocessor does",
    )


def run(args: argparse.Namespace) -> int:
    import timm
    import torch

    if args.top < 1:
        raise ValueError(f"--top must be at least 1, got {args.top}")
    images = [picture(path) for path in args.images or [None]]
    model, origin = build(args.model, args.weights, args.or_random)
    if not model.num_classes:
        raise ValueError(f"{args.weights} has no classifier: it is a backbone")
    squash = dict(crop_pct=1.0, crop_mode="squash") if args.crop == "squash" else {}
    config = timm.data.resolve_data_config(squash, model=model.eval())
    transform = timm.data.create_transform(**config)
    names = class_names(model.num_classes)

    print(f"{args.model} with {origin}, {config['input_size'][1]} x {config['input_size'][2]}, {args.crop} crop")
    for path, image in zip(args.images or ["a drawn picture"], images, strict=True):
        with torch.inference_mode():
            probabilities = model(transform(image)[None])[0].softmax(-1)
        print(f"\n{path}")
        for probability, index in zip(*probabilities.topk(min(args.top, len(names))), strict=True):
            print(f"  {100 * probability:6.2f} %  {index:5}  {names[index]}")
    if origin == "random weights":
        print("\nRandom weights: the classes above mean nothing.")
    return 0


def class_names(count: int) -> Sequence[str]:
    """ImageNet's names for the sizes of its label sets, else numbers."""
    from timm.data import ImageNetInfo

    subset = {1000: "imagenet-1k", 21841: "imagenet-22k"}.get(count)
    if subset is None:
        return [f"class {i}" for i in range(count)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(i, detailed=False) for i in range(count)]
