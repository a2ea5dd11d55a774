"""`dinat-triton classify`: what images show, with the published weights, a file's, or random ones when told so."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

HUB, RANDOM = "hub", "random"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="none: a picture drawn on the spot")
    parser.add_argument("--model", default="dinat_mini", help="any registered model (default: dinat_mini)")
    parser.add_argument(
        "--weights", default=HUB, metavar="FILE", help=f"a checkpoint in any layout, {HUB!r} (default) or {RANDOM!r}"
    )
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
    images = [open_image(path) for path in args.images] or [drawn_image()]
    model, origin = build(args.model, args.weights, args.or_random)
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


def build(name: str, weights: str, or_random: bool = False) -> tuple[Any, str]:
    """A model and what its weights are."""
    import timm
    import torch

    import dinat_triton  # noqa: F401  (registers the models)
    from dinat_triton.models import checkpoints

    if not timm.is_model(name.split(".")[0]):
        raise ValueError(f"no model {name!r}; timm.list_models('*nat_*') lists them")
    if weights == HUB:
        try:
            model = from_hub(name)
            return model, f"weights of {model.pretrained_cfg['hf_hub_id'] or model.pretrained_cfg['url']}"
        except Exception as error:
            if not or_random:
                raise RuntimeError(
                    f"no weights of {name} from the hub ({str(error).splitlines()[0]}). "
                    f"Pass --weights FILE, or --weights {RANDOM} to run without"
                ) from error
    if weights in (HUB, RANDOM):
        torch.manual_seed(0)
        return timm.create_model(name), "random weights"
    checkpoint = checkpoints.read_checkpoint(weights)
    classes = checkpoints.model_args(checkpoint.tensors)["num_classes"]
    if not classes:
        raise ValueError(f"{weights} has no classifier: it is a backbone")
    model = timm.create_model(name, num_classes=classes)
    checkpoints.load_checkpoint(model, checkpoint)
    return model, f"weights of {weights}"


def from_hub(name: str) -> Any:
    """Downloads weights, or takes them from the cache; where there is no network it says so within seconds."""
    import huggingface_hub
    import timm

    constants = huggingface_hub.constants
    was_offline = constants.HF_HUB_OFFLINE
    try:
        huggingface_hub.utils.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:
        constants.HF_HUB_OFFLINE = True
    try:
        return timm.create_model(name, pretrained=True)
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def open_image(path: Path) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no image that can be read") from error


def drawn_image() -> Image:
    """A sunset, so that there is something to look at without a file."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[0:320, 0:480] / 320
    sun = (np.hypot(x - 0.75, y - 0.55) < 0.14)[..., None]
    sky = np.stack([220 - 60 * y, 120 + 70 * y, 90 + 60 * (1 - y)], -1)
    sea = np.stack([40 + 60 * y, 60 + 30 * np.sin(60 * y), 110 + 20 * np.sin(40 * x + 90 * y)], -1)
    picture = np.where((y > 0.6)[..., None], sea, np.where(sun, [255, 225, 120], sky))
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def class_names(count: int) -> Sequence[str]:
    """ImageNet's names for the sizes of its label sets, else numbers."""
    from timm.data import ImageNetInfo

    subset = {1000: "imagenet-1k", 21841: "imagenet-22k"}.get(count)
    if subset is None:
        return [f"class {i}" for i in range(count)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(i, detailed=False) for i in range(count)]
