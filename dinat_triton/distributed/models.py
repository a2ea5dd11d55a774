"""Models of the family on an image that is cut over ranks.

Every layer that sees more than one token becomes a subclass of itself that knows maps are sharded. Between layers a map
is a DTensor; inside, what needs no neighbors (norms, projections, MLPs) runs on the local part as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from timm.layers import ClassifierHead, PatchEmbed
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dinat_triton.distributed.agreement import agree, check_local_part, form_of
from dinat_triton.distributed.attention import attend_shards
from dinat_triton.distributed.gradients import shared, sum_gradients, total
from dinat_triton.distributed.maps import ShardedMap, convolve, convolved_shape, read, resize
from dinat_triton.models.dinat import ConvDownsampler, ConvTokenizer, NeighborhoodBlock
from dinat_triton.modules import NeighborhoodAttention2D, split_heads

Model = TypeVar("Model", bound=nn.Module)


def shard_map(model: Model, mesh: DeviceMesh) -> Model:
    """Changes a model of the family, in place, into one that takes images cut over the ranks of a mesh.

    Its input is a DTensor `[batch, channels, height, width]`: a mesh of one dimension shards the height, one of two the
    height and the width. Logits are plain tensors, alike on all ranks of the mesh; feature maps are DTensors, sharded
    like the image. After the backward of a loss every rank has the gradients of all parameters that one process would
    have. The parameters become those of the mesh's first rank.

    Call it before `fully_shard` or `DistributedDataParallel`, which may take another dimension of the mesh.

    Args:
        model: A NAT, DiNAT, DiNAT_s or isotropic model, with or without `features_only`.
        mesh: The ranks that share an image.
    """
    if mesh.ndim > 2:
        raise ValueError(f"mesh must have one or two dimensions, for height and width, got {tuple(mesh.shape)}")
    layers = _layers_with_maps(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            first = tensor.contiguous()
            for dim in range(mesh.ndim):
                dist.broadcast(first, group=mesh.get_group(dim), group_src=0)
            tensor.copy_(first)
    for layer in layers:
        layer.__class__ = SHARDED[type(layer)]
    return model


def _layers_with_maps(module: nn.Module, name: str = "model") -> list[nn.Module]:
    """The layers that get or give a map, and attentions within them."""
    if type(module) in SHARDED:
        return [module, *(layer for layer in module.modules() if type(layer) is NeighborhoodAttention2D)]
    if next(module.parameters(recurse=False), None) is not None:
        known = ", ".join(layer.__name__ for layer in SHARDED)
        raise TypeError(f"model must be made of {known} and layers without parameters; {name} is {type(module)}")
    children = [_layers_with_maps(child, f"{name}.{key}") for key, child in module.named_children()]
    return [layer for found in children for layer in found]


class ShardedTokenizer(ConvTokenizer):
    """A patch embedding of overlapping patches: every convolution reads a row beyond the rank's own."""

    def forward(self, x: Tensor) -> Tensor:
        on, x = _image(x)
        sum_gradients(self.parameters(), on.groups)
        convs: Iterable[Any] = self.proj
        for conv in convs:
            shape = convolved_shape(conv, on.shape)
            on, x = on.resized(shape), convolve(conv, x, on, shape)
        return on.whole(self.norm(x))


class ShardedPatchEmbed(PatchEmbed):
    """A patch embedding of patches apart; those at the end of an image that they do not divide are padded."""

    def forward(self, x: Tensor) -> Tensor:
        on, x = _image(x)
        sum_gradients(self.parameters(), on.groups)
        shape = [-(-n // patch) for n, patch in zip(on.shape, self.patch_size, strict=True)]
        return on.resized(shape).whole(self.norm(convolve(self.proj, x, on, shape)))


class ShardedDownsampler(ConvDownsampler):
    """A downsampling by an overlapping convolution."""

    def forward(self, x: Tensor) -> Tensor:
        on, x = _local(x, self)
        shape = convolved_shape(self.reduction, on.shape)
        return on.resized(shape).whole(self.norm(convolve(self.reduction, x, on, shape)))


class ShardedMerging(PatchMerging):
    """A downsampling by merging 2x2 tokens, which may lie on two ranks."""

    def forward(self, x: Tensor) -> Tensor:
        on, x = _local(x, self)
        shape = [-(-n // 2) for n in on.shape]
        return on.resized(shape).whole(super().forward(read(x, on, shape, (2, 2), (2, 2), (0, 0))))


class ShardedNorm(nn.LayerNorm):
    """A norm of the tokens of a map."""

    def forward(self, x: Tensor) -> Tensor:
        on, x = _local(x, self)
        return on.whole(super().forward(x))


class ShardedBlock(NeighborhoodBlock):
    """A block: all of it is local but the attention."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        on, x = _local(x, self)
        x = x + _drop_path(self.drop_path1, self.ls1(self.attn(self.norm1(x), on)), on)
        x = x + _drop_path(self.drop_path2, self.ls2(self.mlp(self.norm2(x))), on)
        return on.whole(x)


class ShardedAttention(NeighborhoodAttention2D):
    """An attention on the local part of a map."""

    def forward(self, x: Tensor, on: ShardedMap) -> Tensor:  # type: ignore[override]
        padded = on.resized([max(n, span) for n, span in zip(on.shape, self.span, strict=True)])
        qkv = split_heads(self.qkv(resize(x, on, padded.shape)), self.qkv_sizes)
        rpb = None if self.rpb is None else shared(self.rpb, on.groups)
        dropout_p = self.attn_drop.p if self.attn_drop.training else 0.0
        query, key, value = qkv.unbind(-3)
        out, _ = attend_shards(query, key, value, padded.shape, self.window, padded.splits, rpb, self.scale, dropout_p)
        return self.proj_drop(self.proj(resize(out.flatten(-2), padded, on.shape)))


class ShardedHead(ClassifierHead):
    """A classifier on the average of a map; ranks add what they have of it."""

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        on, x = _local(x)
        pool = self.global_pool.pool_type
        if pool == "" and isinstance(self.fc, nn.Identity):
            return on.whole(self.drop(x))
        if pool != "avg":
            raise ValueError(f"global_pool must be 'avg' on sharded maps, or '' without a classifier, got {pool!r}")
        height, width = on.shape
        sums = total(x.sum((1, 2), dtype=torch.promote_types(x.dtype, torch.float32)), on.groups)
        pooled = self.drop((sums / (height * width)).to(x.dtype))
        return pooled if pre_logits else self.fc(pooled)


SHARDED: dict[type[nn.Module], type[nn.Module]] = {
    ConvTokenizer: ShardedTokenizer,
    PatchEmbed: ShardedPatchEmbed,
    ConvDownsampler: ShardedDownsampler,
    PatchMerging: ShardedMerging,
    NeighborhoodBlock: ShardedBlock,
    NeighborhoodAttention2D: ShardedAttention,
    nn.LayerNorm: ShardedNorm,
    ClassifierHead: ShardedHead,
}


@torch.compiler.disable
def _image(x: Tensor) -> tuple[ShardedMap, Tensor]:
    """The map of an image, and its local part with its channels last."""
    if not isinstance(x, DTensor):
        raise TypeError(f"image must be a DTensor sharded over its height and maybe width, got a {type(x).__name__}")
    agree(x.device_mesh, (("image", form_of(x)),), _problem(x))
    return ShardedMap.of(x, 2), x.to_local().permute(0, 2, 3, 1).contiguous()


def _problem(image: DTensor) -> Exception | None:
    try:
        ShardedMap.of(image, 2, "image")
        check_local_part("image", image)
    except ValueError as error:
        return error
    return None


def _local(x: Tensor, layer: nn.Module | None = None) -> tuple[ShardedMap, Tensor]:
    """The map of `[batch, height, width, channels]`, and its local part. Gradients of the layer will be summed."""
    assert isinstance(x, DTensor)
    on = ShardedMap.of(x)
    if layer is not None:
        # That of the attention's bias is, in a fixed order, and once.
        parameters = [parameter for name, parameter in layer.named_parameters() if not name.endswith("rpb")]
        sum_gradients(parameters, on.groups)
    return on, x.to_local()


def _drop_path(layer: nn.Module, x: Tensor, on: ShardedMap) -> Tensor:
    """Drops the same samples on all ranks, those of the first."""
    if isinstance(layer, nn.Identity) or not layer.training:
        return x
    kept = layer(x.new_ones(len(x), *[1] * (x.ndim - 1)))
    for group in on.groups:
        dist.broadcast(kept, group=group, group_src=0)
    return x * kept
