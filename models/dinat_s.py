"""DiNAT_s: Swin Transformer with its windows replaced by dilated neighborhoods.

Paper: `Dilated Neighborhood Attention Transformer` - https://arxiv.org/abs/2209.15001
"""

from functools import partial
from typing import Any

from timm.layers import PatchEmbed
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging

from dinat_triton.models.dinat import AUTHORS, DiNAT, _cfg, _cfg_384, create_dinat

# Non-overlapping patches; an image they do not divide is padded at the bottom and right.
PatchTokenizer = partial(PatchEmbed, img_size=None, output_fmt="NHWC", strict_img_size=False, dynamic_img_pad=True)

IN1K, IN22K = f"{AUTHORS}/imagenet1k", f"{AUTHORS}/imagenet22k"
FIRST_CONV = "patch_embed.proj"

default_cfgs = generate_default_cfgs(
    {
        "dinat_s_tiny.in1k": _cfg(f"{IN1K}/dinat_s_tiny_in1k_224.pth", first_conv=FIRST_CONV),
        "dinat_s_small.in1k": _cfg(f"{IN1K}/dinat_s_small_in1k_224.pth", first_conv=FIRST_CONV),
        "dinat_s_base.in1k": _cfg(f"{IN1K}/dinat_s_base_in1k_224.pth", first_conv=FIRST_CONV),
        "dinat_s_large.in22k_ft_in1k": _cfg(f"{IN1K}/dinat_s_large_in1k_224.pth", first_conv=FIRST_CONV),
        "dinat_s_large.in22k": _cfg(f"{IN22K}/dinat_s_large_in22k_224.pth", first_conv=FIRST_CONV, num_classes=21841),
        "dinat_s_large_384.in22k_ft_in1k": _cfg_384(f"{IN1K}/dinat_s_large_in1k_384.pth", first_conv=FIRST_CONV),
    }
)


def _create_dinat_s(variant: str, pretrained: bool, **kwargs: Any) -> DiNAT:
    layers = dict(mlp_ratio=4, embed_layer=PatchTokenizer, downsample_layer=PatchMerging)
    return create_dinat(variant, pretrained, **(layers | kwargs))


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return _create_dinat_s("dinat_s_tiny", pretrained, **kwargs)


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return _create_dinat_s("dinat_s_small", pretrained, **kwargs)


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return _create_dinat_s("dinat_s_base", pretrained, **kwargs)


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return _create_dinat_s("dinat_s_large", pretrained, **kwargs)


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return _create_dinat_s("dinat_s_large_384", pretrained, **kwargs)
