"""The names of NATTEN 0.20 and 0.21: the argument after `kernel_size` is the stride, and there are no scores."""

from __future__ import annotations

from dinat_triton import modules
from dinat_triton.integrations.natten.attention import attention, merge_attentions
from dinat_triton.integrations.natten.functional import fused, neighborhood_attention_generic
from dinat_triton.integrations.natten.modules import Module

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "attention",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention_generic",
]

na1d, na2d, na3d = fused(1, "0.20"), fused(2, "0.20"), fused(3, "0.20")


class NeighborhoodAttention1D(Module, modules.NeighborhoodAttention1D):
    """`natten.NeighborhoodAttention1D` since 0.20."""

    line = "0.20"


class NeighborhoodAttention2D(Module, modules.NeighborhoodAttention2D):
    """`natten.NeighborhoodAttention2D` since 0.20."""

    line = "0.20"


class NeighborhoodAttention3D(Module, modules.NeighborhoodAttention3D):
    """`natten.NeighborhoodAttention3D` since 0.20."""

    line = "0.20"
