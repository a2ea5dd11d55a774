"""Isotropic NAT and DiNAT: ViT's shape, with neighborhood attention.

Paper: `Dilated Neighborhood Attention Transformer` - https://arxiv.org/abs/2209.15001
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from dinat_triton.models.dilations import largest_dilation, repeated
from dinat_triton.models.dinat import AUTHORS, DiNAT, _cfg, build_dinat
from dinat_triton.models.dinat_s import FIRST_CONV, PatchTokenizer
from dinat_triton.models.variants import VARIANTS

default_cfgs = generate_default_cfgs(
    {
        f"{name}.in1k": _cfg(f"{AUTHORS}/isotropic/{name}_in1k_224.pth", pool_size=(14, 14), first_conv=FIRST_CONV)
        for name in ("nat_isotropic_small", "nat_isotropic_base", "dinat_isotropic_small", "dinat_isotropic_base")
    }
)


def _create_isotropic(variant: str, pretrained: bool, **kwargs: Any) -> DiNAT:
    """One block per level, so that features can be taken after every block. Besides DiNAT's it takes two arguments.

    Args:
        depth: Blocks.
        dilations: One for all blocks, or several to repeat over them; "auto" alternates 1 and the largest.
    """
    layers = dict(patch_size=16, mlp_ratio=4, img_size=None, kernel_size=7, dilations=1, embed_layer=PatchTokenizer)
    args = layers | VARIANTS[variant].args | kwargs
    depth, dilations = args.pop("depth"), args["dilations"]
    if dilations == "auto" and args["img_size"] is not None:
        dilations = (1, largest_dilation(args["img_size"], args["patch_size"], args["kernel_size"]))
    if not isinstance(dilations, (int, str)):
        args["dilations"] = [[dilation] for dilation in repeated(dilations, depth)]
    args |= dict(depths=(1,) * depth, embed_dim=(args["embed_dim"],) * depth)
    return build_dinat(variant, pretrained, **args)


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return _create_isotropic("nat_isotropic_small", pretrained, **kwargs)


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return _create_isotropic("nat_isotropic_base", pretrained, **kwargs)


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return _create_isotropic("dinat_isotropic_small", pretrained, **kwargs)


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return _create_isotropic("dinat_isotropic_base", pretrained, **kwargs)
