"""Inputs of commands: a model with the weights that were asked for, and pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

HUB, RANDOM = "hub", "random"


def add_weights(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds the option for the weights of a model."""
    text = f"a checkpoint in any layout, {HUB!r} or {RANDOM!r} (default: {default!r})"
    parser.add_argument("--weights", default=default, metavar="FILE", help=text)


def build(name: str, weights: str, or_random: bool = False) -> tuple[Any, str]:
    """A model and what its weights are."""
    import timm
    import torch

    import dinat_triton  # noqa: F401  (registers the models)
    from dinat_triton.models import checkpoints
    from dinat_triton.models.hub import from_hub

    if not timm.is_model(name.split(".")[0]):
        raise ValueError(f"no model {name!r}; timm.list_models('*nat_*') lists them")
    if weights == HUB:
        try:
            model = from_hub(name)
            return model, f"weights of {model.pretrained_cfg['hf_hub_id'] or model.pretrained_cfg['url']}"
        except RuntimeError as error:
            if not or_random:
                raise RuntimeError(f"{error}. Pass --weights FILE, or --weights {RANDOM} to run without") from error
    if weights in (HUB, RANDOM):
        torch.manual_seed(0)
        return timm.create_model(name), "random weights"
    checkpoint = checkpoints.read_checkpoint(weights)
    model = timm.create_model(name, num_classes=checkpoints.model_args(checkpoint.tensors)["num_classes"])
    checkpoints.load_checkpoint(model, checkpoint)
    return model, f"weights of {weights}"


def picture(path: Path | None = None) -> Image:
    """The picture in a file, or without one a drawn landscape."""
    from PIL import Image
    from torchvision.transforms.functional import to_pil_image

    from dinat_triton.attention_maps import sample_image

    if path is None:
        return to_pil_image(sample_image(320))
    if not path.is_file():
        raise FileNotFoundError(f"no such picture: {path}")
    try:
        return Image.open(path).convert("RGB")
    except Exception as error:  # Pillow's are of a dozen kinds
        raise ValueError(f"{path} is no picture that can be read: {error}") from error
