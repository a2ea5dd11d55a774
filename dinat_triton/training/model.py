"""The model that is trained: one of timm with its weights, frozen as far as asked, on its processes."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import group_parameters
from torch import nn

from dinat_triton.models.checkpoints import load_checkpoint, read_checkpoint
from dinat_triton.models.dinat import NeighborhoodBlock
from dinat_triton.models.hub import from_hub
from dinat_triton.training.data import seed_from
from dinat_triton.training.recipe import Recipe

HUB, RANDOM = "hub", "random"


def build(recipe: Recipe, classes: int | None, new_classifier: bool = True) -> nn.Module:
    """Creates a recipe's model and loads its weights.

    Args:
        recipe: Model, weights and what becomes of them.
        classes: Of the classifier; None for as many as the model has by default.
        new_classifier: Whether a checkpoint may have other classes, and the classifier starts anew.
    """
    if not timm.is_model(recipe.model.split(".")[0]):
        raise ValueError(f"no model {recipe.model!r}; timm.list_models('*nat_*') lists them")
    options: dict[str, Any] = dict(recipe.model_kwargs)
    if classes is not None:
        options["num_classes"] = classes
    if recipe.drop_path is not None:
        options["drop_path_rate"] = recipe.drop_path
    torch.manual_seed(seed_from(recipe.seed))
    if recipe.weights == HUB:
        model = from_hub(recipe.model, **options)
    else:
        checkpoint = None if recipe.weights == RANDOM else read_checkpoint(recipe.weights)
        model = timm.create_model(recipe.model, **options)
        if checkpoint is not None:
            load_checkpoint(model, checkpoint, new_classifier)
    if recipe.grad_checkpointing:
        model.set_grad_checkpointing()
    freeze(model, recipe.freeze)
    return model


def freeze(model: nn.Module, stages: int) -> None:
    """Stops the first stages from learning, as timm groups them: the patch embedding, then each level."""
    groups = group_parameters(model, model.group_matcher(coarse=True))  # type: ignore[operator]
    if stages >= len(groups):
        raise ValueError(f"--freeze must leave something to learn: the model has {len(groups)} stages, got {stages}")
    for name in [name for stage in sorted(groups)[:stages] for name in groups[stage]]:
        model.get_parameter(name).requires_grad_(False)


def shard(model: nn.Module) -> None:
    """Shards parameters over all processes, block by block (FSDP2)."""
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, NeighborhoodBlock):
            fully_shard(module)
    fully_shard(model)
