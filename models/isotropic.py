"""Isotropic NAT and DiNAT: ViT's shape, with neighborhood attention.

Paper: `Dilated Neighborhood Attention Transformer` - https://arxiv.org/abs/2209.15001
"""

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model

from dinat_triton.models.dinat import AUTHORS, Dilation, DiNAT, _cfg, create_dinat, largest_dilation
from dinat_triton.models.dinat_s import FIRST_CONV, PatchTokenizer

default_cfgs = generate_default_cfgs(
    {
        f"{name}.in1k": _cfg(f"{AUTHORS}/isotropic/{name}_in1k_224.pth", pool_size=(14, 14), first_conv=FIRST_CONV)
        for name in ("nat_isotropic_small", "nat_isotropic_base", "dinat_isotropic_small", "dinat_isotropic_base")
    }
)


def _create_isotropic(
    variant: str,
    pretrained: bool,
    embed_dim: int,
    depth: int = 12,
    dilations: int | str | Sequence[Dilation] = 1,
    **kwargs: Any,
) -> DiNAT:
    """One block per level, so that features can be taken after every block.

    Args:
        depth: Blocks.
        dilations: One for all blocks, or several to repeat over them; "auto" alternates 1 and the largest.
    """
    layers = dict(patch_size=16, mlp_ratio=4, img_size=None, kernel_size=7, embed_layer=PatchTokenizer)
    kwargs = dict(layers, dilations=dilations, **kwargs)
    if dilations == "auto" and kwargs["img_size"] is not None:
        dilations = (1, largest_dilation(kwargs["img_size"], kwargs["patch_size"], kwargs["kernel_size"]))
    if not isinstance(dilations, (int, str)):
        kwargs["dilations"] = [[dilations[i % len(dilations)]] for i in range(depth)]
    return create_dinat(variant, pretrained, depths=(1,) * depth, embed_dim=(embed_dim,) * depth, **kwargs)


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    model_args = dict(embed_dim=384, drop_path_rate=0.1)
    return _create_isotropic("nat_isotropic_small", pretrained, **dict(model_args, **kwargs))


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    model_args = dict(embed_dim=768, drop_path_rate=0.4)
    return _create_isotropic("nat_isotropic_base", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    model_args = dict(embed_dim=384, dilations=(1, 2), drop_path_rate=0.1)
    return _create_isotropic("dinat_isotropic_small", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    model_args = dict(embed_dim=768, dilations=(1, 2), drop_path_rate=0.4)
    return _create_isotropic("dinat_isotropic_base", pretrained, **dict(model_args, **kwargs))
