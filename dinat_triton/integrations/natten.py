"""The names of NATTEN 0.17 to 0.21, on this package: code written against those is ported by its import line.

| NATTEN                                                        | here                                               |
|---------------------------------------------------------------|----------------------------------------------------|
| `na1d`, `na2d`, `na3d` (0.17 to 0.21)                         | the same, with `rpb` as 0.17 had it                |
| `NeighborhoodAttention1D`, `2D`, `3D` (0.17 to 0.21)          | the same state dict; small maps are padded         |
| `na1d_qk`, `na1d_av`, ... `na3d_av` (0.17)                    | the same                                           |
| `natten1dqkrpb`, `natten1dqk`, `natten1dav`, ... `natten3dav` | the same                                           |
| everything of 0.14 and 0.15                                   | `dinat_triton.integrations.natten_0_14`            |
| arguments that choose NATTEN's kernels and their tiles        | accepted without effect                            |
| `backend`                                                     | one of ours chooses, one of NATTEN's has no effect |

In 0.17 the argument after `kernel_size` is the dilation, since 0.20 it is the stride. Where a call does not tell which
is meant, it is refused rather than guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinat_triton import dispatch, functional, modules
from dinat_triton.functional import Bools, Ints
from dinat_triton.integrations.unfused import aggregate, scores
from dinat_triton.reference import accumulator

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

# The positional arguments after `kernel_size`.
_SINCE_0_20 = ("stride", "dilation", "is_causal", "scale", "additional_keys", "additional_values")
_OF_0_17 = ("dilation", "is_causal", "rpb", "scale", "additional_keys", "additional_values")
_MODULE_SINCE_0_20 = ("stride", "dilation", "is_causal", "qkv_bias", "qk_scale", "proj_drop")
_MODULE_OF_0_17 = ("dilation", "is_causal", "rel_pos_bias", "qkv_bias", "qk_scale", "attn_drop", "proj_drop")

# They choose among NATTEN's kernels, or how those are launched, and never change a result.
_KNOBS = {
    "attention_kwargs",
    "backward_kv_splits",
    "backward_kv_tile_shape",
    "backward_q_tile_shape",
    "backward_use_pt_reduction",
    "kernel_schedule",
    "kv_tile_shape",
    "q_tile_shape",
    "run_persistent_kernel",
    "torch_compile",
    "try_fuse_additional_kv",
    "use_experimental_ops",
    "xformers_kwargs",
}


def _named(
    function: str, positional: tuple[Any, ...], keywords: dict[str, Any], old: Sequence[str], new: Sequence[str]
) -> dict[str, Any]:
    """All arguments after `kernel_size` by name, whichever of the two orders the positional ones are in."""
    names = new
    if positional and _is_old(function, positional, keywords, old, new):
        names = old
    if len(positional) > len(names):
        raise TypeError(f"{function} takes at most {len(names)} arguments after kernel_size, got {len(positional)}")
    given = dict(zip(names, positional, strict=False))
    if twice := sorted(set(given) & set(keywords)):
        raise TypeError(f"{function} got {', '.join(twice)} by position and by name")
    return {name: value for name, value in (given | keywords).items() if name not in _KNOBS}


def _is_old(
    function: str, positional: tuple[Any, ...], keywords: dict[str, Any], old: Sequence[str], new: Sequence[str]
) -> bool:
    """Whether positional arguments are in 0.17's order, seen by what only one of the two versions has."""
    if len(positional) > 1:  # is_causal, or dilation
        second = positional[1][0] if isinstance(positional[1], (tuple, list)) else positional[1]
        return second is None or isinstance(second, bool)
    if keywords.keys() & (set(old) - set(new)):
        return True
    only = positional[0]
    if "dilation" in keywords or all(n == 1 for n in (only if isinstance(only, (tuple, list)) else [only])):
        return False
    raise TypeError(
        f"{function} got {only!r} after kernel_size, which NATTEN 0.17 takes for the dilation and NATTEN since 0.20 "
        f"for the stride: pass it by name, dilation={only!r} or stride={only!r}"
    )


def _fused(rank: int) -> Any:
    name = f"na{rank}d"

    def na(
        query: Tensor, key: Tensor, value: Tensor, kernel_size: Ints, *positional: Any, **keywords: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        return _attend(
            rank, query, key, value, kernel_size, **_named(name, positional, keywords, _OF_0_17, _SINCE_0_20)
        )

    na.__name__ = na.__qualname__ = name
    na.__doc__ = f"""`natten.{name}`: neighborhood attention on `[batch, *map, heads, dim]`.

    Args:
        query: Of {rank + 3} axes.
        key: As query; may have fewer heads.
        value: As key.
        kernel_size: Keys in a window along each axis.
        *positional: In the order of 0.17 or of 0.20, where the call tells which.
        **keywords: `stride`, `dilation`, `is_causal`, `rpb`, `scale`, `additional_keys`, `additional_values`,
            `return_lse`, `backend`, and NATTEN's choices of kernels.
    """
    return na


def _attend(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    *,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools | None = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    if (additional_keys is None) != (additional_values is None):
        raise ValueError("additional_keys and additional_values must be given together")
    na = (functional.na1d, functional.na2d, functional.na3d)[rank - 1]
    is_extended = additional_keys is not None
    result = na(
        query,
        key,
        value,
        kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal or False,
        rpb=rpb,
        scale=scale,
        return_lse=return_lse or is_extended,
        backend=backend if backend in dispatch.NAMES else None,
    )
    if not isinstance(result, tuple) or additional_keys is None or additional_values is None:
        return result
    out, lse = _merge(result, _dense(query, additional_keys, additional_values, scale))
    return (out, lse) if return_lse else out


def _dense(query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attention of every query to the same few keys `[batch, count, heads, dim]`, and the log-sum-exp."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    share = query.shape[-2] // keys.shape[-2]
    keys, values = (x.repeat_interleave(share, dim=2) for x in (keys, values))
    logits = torch.einsum("bnhd,bmhd->bnhm", query.flatten(1, -3) * scale, keys)
    logits = logits.to(accumulator(logits.dtype))
    out = torch.einsum("bnhm,bmhd->bnhd", logits.softmax(-1).to(values.dtype), values)
    shape = query.shape[1:-2]
    return out.unflatten(1, shape), logits.logsumexp(-1).unflatten(1, shape)


def _merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One attention and its log-sum-exp out of two over different keys."""
    lse = torch.logaddexp(one[1], other[1])
    first, second = (out * (part - lse).exp()[..., None].to(out.dtype) for out, part in (one, other))
    return first + second, lse


na1d, na2d, na3d = _fused(1), _fused(2), _fused(3)


class _Module:
    """NATTEN's constructor in front of ours."""

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        name = type(self).__name__
        given = dict(zip(("embed_dim", "num_heads", "kernel_size"), positional, strict=False))
        given |= _named(name, positional[3:], keywords, _MODULE_OF_0_17, _MODULE_SINCE_0_20)
        if "dim" in given:  # as it was called before 0.20
            given["embed_dim"] = given.pop("dim")
        given["is_causal"] = given.get("is_causal") or False
        super().__init__(**given)


class NeighborhoodAttention1D(_Module, modules.NeighborhoodAttention1D):
    """`natten.NeighborhoodAttention1D`, with `rel_pos_bias` and `attn_drop` as 0.17 had them."""


class NeighborhoodAttention2D(_Module, modules.NeighborhoodAttention2D):
    """`natten.NeighborhoodAttention2D`, with `rel_pos_bias` and `attn_drop` as 0.17 had them."""


class NeighborhoodAttention3D(_Module, modules.NeighborhoodAttention3D):
    """`natten.NeighborhoodAttention3D`, with `rel_pos_bias` and `attn_drop` as 0.17 had them."""


def _qk(rank: int) -> Any:
    name = f"na{rank}d_qk"

    def qk(
        query: Tensor,
        key: Tensor,
        kernel_size: Ints,
        dilation: Ints = 1,
        additional_keys: Tensor | None = None,
        is_causal: Bools | None = False,
        rpb: Tensor | None = None,
    ) -> Tensor:
        _check_rank(name, rank, query=query, key=key)
        return scores(query, key, kernel_size, dilation, is_causal or False, rpb, additional_keys)

    qk.__name__ = qk.__qualname__ = name
    qk.__doc__ = f"""`natten.functional.{name}`: `query . key + rpb`, `[batch, heads, *map, window]`, not scaled.

    Args:
        query: `[batch, heads, *map, dim]`, of {rank + 3} axes.
        key: As query.
        kernel_size: Keys in a window along each axis.
        dilation: Distance between neighboring keys of a window.
        additional_keys: `[batch, heads, count, dim]` that every query sees too; their scores come last.
        is_causal: Whether a query sees only keys at or before its own position; the others' scores are -inf.
        rpb: Relative positional bias `[heads, 2 * kernel_size - 1 per axis]`.
    """
    return qk


def _av(rank: int) -> Any:
    name = f"na{rank}d_av"

    def av(
        attn: Tensor,
        value: Tensor,
        kernel_size: Ints,
        dilation: Ints = 1,
        additional_values: Tensor | None = None,
        is_causal: Bools | None = False,
    ) -> Tensor:
        _check_rank(name, rank, attn=attn, value=value)
        return aggregate(attn, value, kernel_size, dilation, is_causal or False, additional_values)

    av.__name__ = av.__qualname__ = name
    av.__doc__ = f"""`natten.functional.{name}`: values weighted by `attn`, `[batch, heads, *map, dim]`.

    Args:
        attn: `[batch, heads, *map, window]`, of {rank + 3} axes.
        value: `[batch, heads, *map, dim]`.
        kernel_size: Keys in a window along each axis.
        dilation: Distance between neighboring keys of a window.
        additional_values: `[batch, heads, count, dim]`, of the additional keys.
        is_causal: As for the scores.
    """
    return av


def _check_rank(function: str, rank: int, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.ndim != rank + 3:
            axes = ("length",) if rank == 1 else ("depth", "height", "width")[3 - rank :]
            last = "window" if name == "attn" else "dim"
            raise ValueError(
                f"{name} of {function} must be [batch, heads, {', '.join(axes)}, {last}], got shape {tuple(x.shape)}"
            )


na1d_qk, na2d_qk, na3d_qk = _qk(1), _qk(2), _qk(3)
na1d_av, na2d_av, na3d_av = _av(1), _av(2), _av(3)


def _oldest(rank: int, qk: Any, av: Any) -> tuple[Any, Any, Any]:
    """The oldest names of a rank, whose arguments go by position; depth has arguments of its own, so not of 3-D."""

    def qkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: Ints, dilation: Ints) -> Tensor:
        return qk(query, key, kernel_size, dilation, rpb=rpb)

    def qk_alone(query: Tensor, key: Tensor, kernel_size: Ints, dilation: Ints) -> Tensor:
        return qk(query, key, kernel_size, dilation)

    def av_alone(attn: Tensor, value: Tensor, kernel_size: Ints, dilation: Ints) -> Tensor:
        return av(attn, value, kernel_size, dilation)

    functions = {"qkrpb": qkrpb, "qk": qk_alone, "av": av_alone}
    for suffix, function in functions.items():
        function.__name__ = function.__qualname__ = f"natten{rank}d{suffix}"
        function.__doc__ = f"`na{rank}d_{suffix[:2]}`{' with its bias' if suffix == 'qkrpb' else ''}."
    return qkrpb, qk_alone, av_alone


natten1dqkrpb, natten1dqk, natten1dav = _oldest(1, na1d_qk, na1d_av)
natten2dqkrpb, natten2dqk, natten2dav = _oldest(2, na2d_qk, na2d_av)


def natten3dqkrpb(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
) -> Tensor:
    """`na3d_qk` with its bias; depth has its own kernel size and dilation."""
    window = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
    return na3d_qk(query, key, *window, rpb=rpb)


def natten3dqk(
    query: Tensor, key: Tensor, kernel_size_d: int, kernel_size: int, dilation_d: int, dilation: int
) -> Tensor:
    """`na3d_qk` without bias; depth has its own kernel size and dilation."""
    return natten3dqkrpb(query, key, None, kernel_size_d, kernel_size, dilation_d, dilation)


def natten3dav(
    attn: Tensor, value: Tensor, kernel_size_d: int, kernel_size: int, dilation_d: int, dilation: int
) -> Tensor:
    """`na3d_av`; depth has its own kernel size and dilation."""
    window = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
    return na3d_av(attn, value, *window)
