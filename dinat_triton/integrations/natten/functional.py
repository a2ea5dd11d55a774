"""`natten.functional`: the fused functions, heads last, and the unfused ones, heads first.

The fused ones are made per line (see `arguments`); those of this module are of no line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dinat_triton import functional
from dinat_triton.functional import Bools, Ints
from dinat_triton.integrations.natten.arguments import FUSED, Refused, check_window, named, our_backend, refusing
from dinat_triton.integrations.natten.attention import attend_to_all, attention, merge_attentions
from dinat_triton.integrations.natten.eight_bit import takes_eight_bit
from dinat_triton.integrations.natten.unfused import (
    NeighborhoodAttention1DAVAutogradFunction,
    NeighborhoodAttention1DQKAutogradFunction,
    NeighborhoodAttention2DAVAutogradFunction,
    NeighborhoodAttention2DQKAutogradFunction,
    NeighborhoodAttention3DAVAutogradFunction,
    NeighborhoodAttention3DQKAutogradFunction,
    na1d_av,
    na1d_qk,
    na2d_av,
    na2d_qk,
    na3d_av,
    na3d_qk,
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
from dinat_triton.merging import merge

__all__ = [
    "FusedNeighborhoodAttention1D",
    "FusedNeighborhoodAttention2D",
    "FusedNeighborhoodAttention3D",
    "NeighborhoodAttention1DAVAutogradFunction",
    "NeighborhoodAttention1DQKAutogradFunction",
    "NeighborhoodAttention2DAVAutogradFunction",
    "NeighborhoodAttention2DQKAutogradFunction",
    "NeighborhoodAttention3DAVAutogradFunction",
    "NeighborhoodAttention3DQKAutogradFunction",
    "attention",
    "merge_attentions",
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
    "neighborhood_attention_generic",
]


def fused(rank: int, line: str | None = None) -> Callable[..., Any]:
    """`na1d`, `na2d` or `na3d` of a line."""
    name = f"na{rank}d"
    order = f"NATTEN {line}" if line else "0.17 or of 0.20, if that is clear"

    def na(
        query: Tensor, key: Tensor, value: Tensor, kernel_size: Ints, *positional: Any, **keywords: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        return _attend(rank, line, query, key, value, kernel_size, **named(name, positional, keywords, FUSED, line))

    na.__name__ = na.__qualname__ = name
    na.__doc__ = f"""`natten.{name}`: neighborhood attention on `[batch, *map, heads, dim]`.

    Args:
        query: Of {rank + 3} axes.
        key: As query; may have fewer heads.
        value: As key; may have another dim.
        kernel_size: Keys in a window along each axis.
        *positional: In the order of {order}.
        **keywords: `stride`, `dilation`, `is_causal`, `rpb`, `scale`, `additional_keys`, `additional_values`,
            `return_lse`, `backend`, and NATTEN's choices of kernels, which have no effect.
    """
    return na


def neighborhood_attention_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    *positional: Any,
    **keywords: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`na1d`, `na2d` or `na3d`, whichever the tensors have the axes for; positional arguments as since 0.20."""
    arguments = named("neighborhood_attention_generic", positional, keywords, FUSED, "0.20")
    if query.dim() not in (4, 5, 6):
        raise Refused(f"query must be [batch, 1 to 3 map axes, heads, dim], got shape {tuple(query.shape)}")
    return _attend(query.dim() - 3, None, query, key, value, kernel_size, **arguments)


@takes_eight_bit
def _attend(
    rank: int,
    line: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    *,
    stride: Ints | None = 1,
    dilation: Ints | None = 1,
    is_causal: Bools | None = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    if query.is_nested or key.is_nested or value.is_nested:
        raise NotImplementedError("fused neighborhood attention takes no nested tensors; na*d_qk and na*d_av do")
    if (additional_keys is None) != (additional_values is None):
        raise Refused("additional_keys and additional_values must be given together")
    backend = our_backend(backend)
    kernels, strides, dilations, causal = check_window(rank, kernel_size, stride, dilation, is_causal, line)
    na = (functional.na1d, functional.na2d, functional.na3d)[rank - 1]
    is_extended = additional_keys is not None
    with refusing():
        result = na(
            query,
            key,
            value,
            kernels,
            stride=strides,
            dilation=dilations,
            is_causal=causal,
            rpb=rpb,
            scale=scale,
            return_lse=return_lse or is_extended,
            backend=backend,
        )
        if not isinstance(result, tuple) or additional_keys is None or additional_values is None:
            return result
        own_map = query.shape[1:-2]
        more = attend_to_all(query.flatten(1, -3), additional_keys, additional_values, scale, backend)
    out, lse = merge([result[0], more[0].unflatten(1, own_map)], [result[1], more[1].unflatten(1, own_map)])
    return (out, lse) if return_lse else out


na1d, na2d, na3d = fused(1), fused(2), fused(3)


class FusedFunction:
    """Substitute for NATTEN's autograd function of the fused kernels.

    Args:
        rank: Map axes.
        has_lse: Whether `apply` returns the log-sum-exp too, as since 0.17.4.
    """

    def __init__(self, rank: int, has_lse: bool = False):
        self.rank, self.has_lse = rank, has_lse

    def apply(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        kernel_size: Ints,
        dilation: Ints | None,
        is_causal: Bools | None,
        scale: float,
        *tiles: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`na*d` with all its arguments by position; the tile shapes have no effect."""
        window: dict[str, Any] = {"kernel_size": kernel_size, "dilation": dilation, "is_causal": is_causal}
        return _attend(self.rank, None, query, key, value, **window, rpb=bias, scale=scale, return_lse=self.has_lse)


FusedNeighborhoodAttention1D = FusedFunction(1)
FusedNeighborhoodAttention2D = FusedFunction(2)
FusedNeighborhoodAttention3D = FusedFunction(3)
