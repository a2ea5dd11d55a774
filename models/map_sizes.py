"""The family on padded batches of images of different sizes: every image gives what it would give alone.

Attention takes sizes. Convolutions see zeros around every map, as their own padding has them, and everything else takes
tokens one by one; what these leave in padding is cleared before it is read again.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from timm.models import checkpoint_seq
from torch import nn

from dinat_triton.map_batch import Size, check_sizes, clear_padding, split_maps

Sizes = Sequence[int | Sequence[int]]


def forward_features(model: Any, images: torch.Tensor, sizes: Sizes) -> tuple[torch.Tensor, list[Size]]:
    """Features of all images, `[batch, height, width, channels]`, zero in padding; and the sizes of their maps."""
    *_, (x, own) = forward_levels(model, images, sizes)
    return clear_padding(model.norm(x), own), own


def forward_intermediates(
    model: Any,
    images: torch.Tensor,
    sizes: Sizes,
    take: Sequence[int],
    stop: int,
    norm: bool,
    output_fmt: str,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The features of the level to stop at, and those of some levels, zero in padding."""
    intermediates, norms = [], [*model.feature_norms[:-1], model.norm]
    for i, (x, own) in enumerate(forward_levels(model, images, sizes)):
        if i in take:
            y = clear_padding(norms[i](x) if norm else x, own)
            intermediates.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        if i == stop:
            break
    return clear_padding(norms[i](x) if i == len(norms) - 1 else x, own), intermediates


def forward_head(model: Any, x: torch.Tensor, sizes: list[Size], pre_logits: bool = False) -> torch.Tensor:
    """Runs the head on each map."""
    head = model.head
    if not model.global_pool:
        return clear_padding(head(x, pre_logits=pre_logits), sizes)
    pooled = head.drop(torch.cat([head.global_pool(own) for own in split_maps(x, sizes, False)]))
    return pooled if pre_logits else head.fc(pooled)


def forward_levels(model: Any, images: torch.Tensor, sizes: Sizes) -> Iterator[tuple[torch.Tensor, list[Size]]]:
    """The map of every level, with anything in its padding, and the sizes in it."""
    if hasattr(images, "device_mesh"):
        raise ValueError(f"sizes must be None for images cut over ranks, got {sizes}")
    own = check_sizes((len(images), *images.shape[2:]), sizes, 2)
    for i, size in enumerate(own):
        if min(size) < model.min_size:
            raise ValueError(f"sizes must be at least {model.min_size} x {model.min_size}, got {size} for item {i}")
    x, own = _embed(model.patch_embed, images.permute(0, 2, 3, 1), own)
    for level in model.levels:
        if not isinstance(level.downsample, nn.Identity):
            x, own = level.downsample(clear_padding(x, own)), _shrunk(own, 2)
        blocks = [partial(block, sizes=own) for block in level.blocks]
        if level.grad_checkpointing:
            x = checkpoint_seq(blocks, x)
        else:
            for block in blocks:
                x = block(x)
        yield x, own


def _embed(embed: Any, x: torch.Tensor, sizes: list[Size]) -> tuple[torch.Tensor, list[Size]]:
    """The patch embedding of `[batch, height, width, channels]`."""
    if not isinstance(embed.proj, nn.Sequential):
        patch = embed(clear_padding(x, sizes).permute(0, 3, 1, 2))
        return patch, _shrunk(sizes, embed.patch_size[0])
    for conv in embed.proj:  # each of stride 2
        x = conv(clear_padding(x, sizes).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        sizes = _shrunk(sizes, 2)
    return embed.norm(x), sizes


def _shrunk(sizes: list[Size], stride: int) -> list[Size]:
    return [tuple(-(-n // stride) for n in size) for size in sizes]
