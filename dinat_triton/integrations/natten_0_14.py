"""The names of NATTEN 0.14 and 0.15: code written for those is ported by its import line.

They differ from the later ones where the same call means something else: modules have a relative positional bias unless
told otherwise, and depth has arguments of its own.
"""

from __future__ import annotations

from typing import Any

from dinat_triton import modules
from dinat_triton.integrations.natten.modules import Module
from dinat_triton.integrations.natten.unfused import av, qk, with_bias, with_depth

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "na1d_av",
    "na1d_qk",
    "na1d_qk_with_bias",
    "na2d_av",
    "na2d_qk",
    "na2d_qk_with_bias",
    "na3d_av",
    "na3d_qk",
    "na3d_qk_with_bias",
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

na1d_qk, na1d_av = natten1dqk, natten1dav = qk(1, "0.14"), av(1, "0.14")
na2d_qk, na2d_av = natten2dqk, natten2dav = qk(2, "0.14"), av(2, "0.14")
na1d_qk_with_bias = natten1dqkrpb = with_bias(na1d_qk)
na2d_qk_with_bias = natten2dqkrpb = with_bias(na2d_qk)
na3d_qk_with_bias, na3d_qk, na3d_av = natten3dqkrpb, natten3dqk, natten3dav = with_depth(qk(3, "0.14"), av(3, "0.14"))


class _Module(Module):
    """0.14's attributes are numbers, of the axes but for depth."""

    line = "0.14"
    kernel_size: Any
    dilation: Any
    window_size: Any

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        super().__init__(*positional, **keywords)
        self.kernel_size, self.dilation, self.window_size = self.kernel_size[-1], self.dilation[-1], self.span[-1]


class NeighborhoodAttention1D(_Module, modules.NeighborhoodAttention1D):
    """`natten.NeighborhoodAttention1D` of 0.14 and 0.15."""


class NeighborhoodAttention2D(_Module, modules.NeighborhoodAttention2D):
    """`natten.NeighborhoodAttention2D` of 0.14 and 0.15."""


class NeighborhoodAttention3D(_Module, modules.NeighborhoodAttention3D):
    """`natten.NeighborhoodAttention3D` of 0.15; depth may have its own kernel size and dilation."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        kernel_size_d: int | None = None,
        dilation: int | None = 1,
        dilation_d: int | None = None,
        *positional: Any,
        **keywords: Any,
    ) -> None:
        kernels = (kernel_size_d or kernel_size, kernel_size, kernel_size)
        dilation = dilation or 1
        dilations = (dilation_d or dilation, dilation, dilation)
        super().__init__(dim, num_heads, kernels, dilations, *positional, **keywords)
        self.kernel_size_d, self.dilation_d, self.window_size_d = kernels[0], dilations[0], self.span[0]
