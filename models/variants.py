"""Published variants: the arguments that make each of them, and what their authors report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A published model.

    Attributes:
        args: Arguments of its class and of its kind: hierarchical, DiNAT_s or isotropic.
        gmacs: Billions of multiply-adds for an image of its own size, as published ("FLOPs").
        top1: ImageNet-1k accuracy in percent, as published, of the weights that timm loads by default.
    """

    args: dict[str, Any]
    gmacs: float
    top1: float


_MINI = dict(depths=(3, 4, 6, 5), embed_dim=64, mlp_ratio=3, drop_path_rate=0.2)
_TINY = dict(depths=(3, 4, 18, 5), embed_dim=64, mlp_ratio=3, drop_path_rate=0.2)
_SMALL = dict(depths=(3, 4, 18, 5), embed_dim=96, mlp_ratio=2, drop_path_rate=0.3)
_BASE = dict(depths=(3, 4, 18, 5), embed_dim=128, mlp_ratio=2, layer_scale=1e-5, drop_path_rate=0.5)
_LARGE = dict(depths=(3, 4, 18, 5), embed_dim=192, mlp_ratio=2, drop_path_rate=0.35)
_S_TINY = dict(depths=(2, 2, 6, 2), embed_dim=96, drop_path_rate=0.2)
_S_SMALL = dict(depths=(2, 2, 18, 2), embed_dim=96, drop_path_rate=0.3)
_S_BASE = dict(depths=(2, 2, 18, 2), embed_dim=128, drop_path_rate=0.5)
_S_LARGE = dict(depths=(2, 2, 18, 2), embed_dim=192, drop_path_rate=0.35)
_ISOTROPIC_SMALL = dict(depth=12, embed_dim=384, drop_path_rate=0.1)
_ISOTROPIC_BASE = dict(depth=12, embed_dim=768, drop_path_rate=0.4)

VARIANTS = {
    "nat_mini": Variant(_MINI, 2.7, 81.8),
    "nat_tiny": Variant(_TINY, 4.3, 83.2),
    "nat_small": Variant(_SMALL | dict(layer_scale=1e-5), 7.8, 83.7),
    "nat_base": Variant(_BASE, 13.7, 84.3),
    "dinat_mini": Variant(_MINI | dict(dilations="224"), 2.7, 81.8),
    "dinat_tiny": Variant(_TINY | dict(dilations="224"), 4.3, 82.7),
    "dinat_small": Variant(_SMALL | dict(dilations="224"), 7.8, 83.8),
    "dinat_base": Variant(_BASE | dict(dilations="224"), 13.7, 84.4),
    "dinat_large": Variant(_LARGE | dict(dilations="224"), 30.6, 86.6),
    "dinat_large_384": Variant(_LARGE | dict(dilations="384"), 89.7, 87.4),
    "dinat_large_384_11x11": Variant(_LARGE | dict(dilations="224", kernel_size=11), 92.4, 87.5),
    "dinat_s_tiny": Variant(_S_TINY | dict(dilations="224"), 4.5, 81.8),
    "dinat_s_small": Variant(_S_SMALL | dict(dilations="224"), 8.7, 83.5),
    "dinat_s_base": Variant(_S_BASE | dict(dilations="224"), 15.4, 83.8),
    "dinat_s_large": Variant(_S_LARGE | dict(dilations="224"), 34.5, 86.5),
    "dinat_s_large_384": Variant(_S_LARGE | dict(dilations="384"), 101.5, 87.4),
    "nat_isotropic_small": Variant(_ISOTROPIC_SMALL, 4.3, 80.0),
    "nat_isotropic_base": Variant(_ISOTROPIC_BASE, 16.9, 81.6),
    "dinat_isotropic_small": Variant(_ISOTROPIC_SMALL | dict(dilations=(1, 2)), 4.3, 80.8),
    "dinat_isotropic_base": Variant(_ISOTROPIC_BASE | dict(dilations=(1, 2)), 16.9, 82.1),
}
