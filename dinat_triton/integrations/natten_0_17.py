"""The names of NATTEN 0.17: the argument after `kernel_size` is the dilation, and modules may have a bias."""

from __future__ import annotations

from dinat_triton import modules
from dinat_triton.integrations.natten.functional import fused
from dinat_triton.integrations.natten.modules import Module
from dinat_triton.integrations.natten.unfused import av, qk, with_bias, with_depth

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
]

na1d, na2d, na3d = fused(1, "0.17"), fused(2, "0.17"), fused(3, "0.17")
na1d_qk, na1d_av = natten1dqk, natten1dav = qk(1, "0.17"), av(1, "0.17")
na2d_qk, na2d_av = natten2dqk, natten2dav = qk(2, "0.17"), av(2, "0.17")
na3d_qk, na3d_av = qk(3, "0.17"), av(3, "0.17")
natten1dqkrpb, natten2dqkrpb = with_bias(na1d_qk), with_bias(na2d_qk)
natten3dqkrpb, natten3dqk, natten3dav = with_depth(na3d_qk, na3d_av)


class NeighborhoodAttention1D(Module, modules.NeighborhoodAttention1D):
    """`natten.NeighborhoodAttention1D` of 0.17."""

    line = "0.17"


class NeighborhoodAttention2D(Module, modules.NeighborhoodAttention2D):
    """`natten.NeighborhoodAttention2D` of 0.17."""

    line = "0.17"


class NeighborhoodAttention3D(Module, modules.NeighborhoodAttention3D):
    """`natten.NeighborhoodAttention3D` of 0.17."""

    line = "0.17"
