"""The unfused names of `natten.functional`, heads first: scores, and sums of values weighted by them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dinat_triton.functional import Bools, Ints
from dinat_triton.integrations.natten.arguments import Refused, check_odd, check_window, refusing
from dinat_triton.integrations.unfused import aggregate, scores


def qk(rank: int, line: str | None = None) -> Callable[..., Tensor]:
    """`na1d_qk`, `na2d_qk` or `na3d_qk` of a line."""
    name = f"na{rank}d_qk"

    def na_qk(
        query: Tensor,
        key: Tensor,
        kernel_size: Ints,
        dilation: Ints | None = 1,
        additional_keys: Tensor | None = None,
        is_causal: Bools | None = False,
        rpb: Tensor | None = None,
    ) -> Tensor:
        if query.is_nested or key.is_nested:
            options = (kernel_size, dilation), {"is_causal": is_causal, "rpb": rpb}
            return _nested(na_qk, (query, key), additional_keys, *options)
        _check_rank(name, rank, query=query, key=key)
        kernels, _, dilations, causal = check_window(rank, kernel_size, 1, dilation, is_causal, line)
        check_odd(kernels, line)
        with refusing():
            return scores(query, key, kernels, dilations, causal, rpb, additional_keys)

    na_qk.__name__ = na_qk.__qualname__ = name
    na_qk.__doc__ = f"""`natten.functional.{name}`: `query . key + rpb`, `[batch, heads, *map, window]`, not scaled.

    Args:
        query: `[batch, heads, *map, dim]`, of {rank + 3} axes; or nested, of such tensors.
        key: As query.
        kernel_size: Keys in a window along each axis.
        dilation: Distance between neighboring keys of a window.
        additional_keys: `[batch, heads, count, dim]` that every query sees too; their scores come last.
        is_causal: Whether a query sees only keys at or before its own position; the others' scores are -inf.
        rpb: Relative positional bias `[heads, 2 * kernel_size - 1 per axis]`.
    """
    return na_qk


def av(rank: int, line: str | None = None) -> Callable[..., Tensor]:
    """`na1d_av`, `na2d_av` or `na3d_av` of a line."""
    name = f"na{rank}d_av"

    def na_av(
        attn: Tensor,
        value: Tensor,
        kernel_size: Ints,
        dilation: Ints | None = 1,
        additional_values: Tensor | None = None,
        is_causal: Bools | None = False,
    ) -> Tensor:
        if attn.is_nested or value.is_nested:
            options = (kernel_size, dilation), {"is_causal": is_causal}
            return _nested(na_av, (attn, value), additional_values, *options)
        _check_rank(name, rank, attn=attn, value=value)
        kernels, _, dilations, causal = check_window(rank, kernel_size, 1, dilation, is_causal, line)
        check_odd(kernels, line)
        if additional_values is None:
            suggest_fused(rank, attn)
        with refusing():
            return aggregate(attn, value, kernels, dilations, causal, additional_values)

    na_av.__name__ = na_av.__qualname__ = name
    na_av.__doc__ = f"""`natten.functional.{name}`: values weighted by `attn`, `[batch, heads, *map, dim]`.

    Args:
        attn: `[batch, heads, *map, window]`, of {rank + 3} axes; cast to the dtype of value.
        value: `[batch, heads, *map, dim]`.
        kernel_size: Keys in a window along each axis.
        dilation: Distance between neighboring keys of a window.
        additional_values: `[batch, heads, count, dim]`, of the additional keys.
        is_causal: As for the scores.
    """
    return na_av


def _nested(
    function: Callable[..., Tensor],
    tensors: tuple[Tensor, Tensor],
    additional: Tensor | None,
    window: tuple[Any, Any],
    options: dict[str, Any],
) -> Tensor:
    """A function of each of the tensors that nested ones hold."""
    if not all(x is None or x.is_nested for x in (*tensors, additional)):
        raise Refused("either all tensors must be nested or none")
    more = [None] * tensors[0].size(0) if additional is None else additional.unbind()
    parts = zip(*(x.unbind() for x in tensors), more, strict=True)
    return torch.nested.as_nested_tensor([function(a, b, *window, extra, **options) for a, b, extra in parts])


def _check_rank(function: str, rank: int, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.ndim != rank + 3:
            axes = ("length",) if rank == 1 else ("depth", "height", "width")[3 - rank :]
            last = "window" if name == "attn" else "dim"
            raise Refused(
                f"{name} of {function} must be [batch, heads, {', '.join(axes)}, {last}], got shape {tuple(x.shape)}"
            )


_suggested: set[int] = set()  # ranks
WORTH_SAVING = 1 << 20  # bytes


def suggest_fused(rank: int, attn: Tensor) -> None:
    """Says once per rank which fused call does the same, where weights are a softmax as it comes."""
    size = attn.numel() * attn.element_size()
    if rank in _suggested or size < WORTH_SAVING or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    _suggested.add(rank)
    if torch.allclose(attn.detach().float().sum(-1), attn.new_ones((), dtype=torch.float32), atol=0.02):
        warnings.warn(
            f"na{rank}d_qk, softmax and na{rank}d_av hold {size / 2**20:.0f} MiB of scores here; "
            f"na{rank}d(query, key, value, kernel_size, dilation=dilation, rpb=rpb, scale=1.0), with tensors "
            f"[batch, map, heads, dim], computes the same without them",
            stacklevel=3,
        )


class UnfusedFunction:
    """Substitute for one of NATTEN's autograd functions.

    Args:
        function: An `na*d_qk` or `na*d_av`.
        has_bias: Whether its third argument is a bias.
    """

    def __init__(self, function: Callable[..., Tensor], has_bias: bool):
        self.function, self.has_bias = function, has_bias

    def apply(self, first: Tensor, second: Tensor, *rest: Any) -> Tensor:
        """The function with all arguments by position; older callers have no `is_causal`, or no additional tokens."""
        options = {"rpb": rest[0]} if self.has_bias else {}
        rest = rest[self.has_bias :]
        has_additional = rest[0] is None or isinstance(rest[0], Tensor)
        kernel_size, dilation, *causal = rest[has_additional:]
        return self.function(
            first, second, kernel_size, dilation, rest[0] if has_additional else None, *causal, **options
        )


na1d_qk, na2d_qk, na3d_qk = qk(1), qk(2), qk(3)
na1d_av, na2d_av, na3d_av = av(1), av(2), av(3)
NeighborhoodAttention1DQKAutogradFunction = UnfusedFunction(na1d_qk, has_bias=True)
NeighborhoodAttention2DQKAutogradFunction = UnfusedFunction(na2d_qk, has_bias=True)
NeighborhoodAttention3DQKAutogradFunction = UnfusedFunction(na3d_qk, has_bias=True)
NeighborhoodAttention1DAVAutogradFunction = UnfusedFunction(na1d_av, has_bias=False)
NeighborhoodAttention2DAVAutogradFunction = UnfusedFunction(na2d_av, has_bias=False)
NeighborhoodAttention3DAVAutogradFunction = UnfusedFunction(na3d_av, has_bias=False)


def with_bias(na_qk: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The older form of `na1d_qk` or `na2d_qk`, whose bias goes by position."""

    def na_qk_with_bias(
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        kernel_size: Ints,
        dilation: Ints | None,
        additional_keys: Tensor | None = None,
    ) -> Tensor:
        return na_qk(query, key, kernel_size, dilation, additional_keys, rpb=bias)

    na_qk_with_bias.__doc__ = f"`{na_qk.__name__}` with its bias."
    return na_qk_with_bias


def with_depth(na_qk: Callable[..., Tensor], na_av: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], ...]:
    """The older forms of `na3d_qk`, with and without bias, and of `na3d_av`: depth has arguments of its own."""

    def window(
        kernel_size_d: int, kernel_size: int, dilation_d: int | None, dilation: int | None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        dilation = 1 if dilation is None else dilation
        dilation_d = dilation if dilation_d is None else dilation_d
        return (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)

    def qk_with_bias(
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        kernel_size_d: int,
        kernel_size: int,
        dilation_d: int | None,
        dilation: int | None,
        additional_keys: Tensor | None = None,
    ) -> Tensor:
        """`na3d_qk` with its bias; depth has its own kernel size and dilation."""
        return na_qk(query, key, *window(kernel_size_d, kernel_size, dilation_d, dilation), additional_keys, rpb=bias)

    def qk_alone(
        query: Tensor,
        key: Tensor,
        kernel_size_d: int,
        kernel_size: int,
        dilation_d: int | None,
        dilation: int | None,
        additional_keys: Tensor | None = None,
    ) -> Tensor:
        """`na3d_qk` without bias; depth has its own kernel size and dilation."""
        return na_qk(query, key, *window(kernel_size_d, kernel_size, dilation_d, dilation), additional_keys)

    def av_alone(
        attn: Tensor,
        value: Tensor,
        kernel_size_d: int,
        kernel_size: int,
        dilation_d: int | None,
        dilation: int | None,
        additional_values: Tensor | None = None,
    ) -> Tensor:
        """`na3d_av`; depth has its own kernel size and dilation."""
        return na_av(attn, value, *window(kernel_size_d, kernel_size, dilation_d, dilation), additional_values)

    return qk_with_bias, qk_alone, av_alone


natten1dqkrpb, natten1dqk, natten1dav = with_bias(na1d_qk), na1d_qk, na1d_av
natten2dqkrpb, natten2dqk, natten2dav = with_bias(na2d_qk), na2d_qk, na2d_av
natten3dqkrpb, natten3dqk, natten3dav = with_depth(na3d_qk, na3d_av)
