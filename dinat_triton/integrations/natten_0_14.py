"""The names of NATTEN 0.14 and 0.15, on this package: code written against those is ported by its import line.

They differ from the later ones (`dinat_triton.integrations.natten`) where the same call means something else: modules
have a relative positional bias unless told otherwise, and depth has arguments of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dinat_triton import modules
from dinat_triton.integrations import natten
from dinat_triton.integrations.natten import (
    natten1dav,
    natten1dqk,
    natten1dqkrpb,
    natten2dav,
    natten2dqk,
    natten2dqkrpb,
    natten3dav,
    natten3dqk,
    natten3dqkrpb,
)

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

na1d_qk, na1d_av = natten.na1d_qk, natten.na1d_av
na2d_qk, na2d_av = natten.na2d_qk, natten.na2d_av


def _with_bias(qk: Any) -> Any:
    """`qk` with its bias as an argument by position; depth has arguments of its own, so not of 3-D."""

    def with_bias(
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        kernel_size: int,
        dilation: int,
        additional_keys: Tensor | None = None,
    ) -> Tensor:
        return qk(query, key, kernel_size, dilation, additional_keys, rpb=bias)

    with_bias.__name__ = with_bias.__qualname__ = f"{qk.__name__}_with_bias"
    with_bias.__doc__ = f"`{qk.__name__}` with its bias."
    return with_bias


na1d_qk_with_bias, na2d_qk_with_bias = _with_bias(na1d_qk), _with_bias(na2d_qk)


def na3d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """`na3d_qk` with its bias; depth has its own kernel size and dilation."""
    window = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
    return natten.na3d_qk(query, key, *window, additional_keys, rpb=bias)


def na3d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """`na3d_qk` without bias; depth has its own kernel size and dilation."""
    return na3d_qk_with_bias(query, key, None, kernel_size_d, kernel_size, dilation_d, dilation, additional_keys)


def na3d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_values: Tensor | None = None,
) -> Tensor:
    """`na3d_av`; depth has its own kernel size and dilation."""
    window = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
    return natten.na3d_av(attn, value, *window, additional_values)


class _Module:
    """The older constructor in front of ours."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int | None = 1,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        window = {"kernel_size": kernel_size, "dilation": dilation or 1, "rel_pos_bias": bias}
        drop = {"attn_drop": attn_drop, "proj_drop": proj_drop}
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, qk_scale=qk_scale, **window, **drop)  # type: ignore[call-arg]


class NeighborhoodAttention1D(_Module, modules.NeighborhoodAttention1D):
    """`natten.NeighborhoodAttention1D` of 0.14 and 0.15."""


class NeighborhoodAttention2D(_Module, modules.NeighborhoodAttention2D):
    """`natten.NeighborhoodAttention2D` of 0.14 and 0.15."""


class NeighborhoodAttention3D(modules.NeighborhoodAttention3D):
    """`natten.NeighborhoodAttention3D` of 0.15; depth may have its own kernel size and dilation."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        kernel_size_d: int | None = None,
        dilation: int | None = 1,
        dilation_d: int | None = None,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        dilation = dilation or 1
        super().__init__(
            dim,
            num_heads,
            (kernel_size_d or kernel_size, kernel_size, kernel_size),
            dilation=(dilation_d or dilation, dilation, dilation),
            rel_pos_bias=bias,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )
