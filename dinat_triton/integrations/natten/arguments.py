"""Meaning of the arguments of NATTEN's functions, which depends on its version.

A `line` is the first of some versions that agree: "0.14", "0.15", "0.17" or "0.20", or None where it is not decided.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dinat_triton import dispatch
from dinat_triton.geometry import broadcast_bools, broadcast_ints

# The arguments after `kernel_size`, by position.
FUSED = {
    "0.17": ("dilation", "is_causal", "rpb", "scale", "additional_keys", "additional_values"),
    "0.20": ("stride", "dilation", "is_causal", "scale", "additional_keys", "additional_values"),
}
MODULE = {
    "0.14": ("dilation", "bias", "qkv_bias", "qk_scale", "attn_drop", "proj_drop"),
    "0.17": ("dilation", "is_causal", "rel_pos_bias", "qkv_bias", "qk_scale", "attn_drop", "proj_drop"),
    "0.20": ("stride", "dilation", "is_causal", "qkv_bias", "qk_scale", "proj_drop"),
}

# They choose among NATTEN's kernels, or how those are launched, and never change a result.
KNOBS = {
    *("attention_kwargs", "torch_compile", "try_fuse_additional_kv", "use_experimental_ops", "xformers_kwargs"),
    *("backward_kv_splits", "backward_use_pt_reduction", "kernel_schedule", "run_persistent_kernel"),
    *("backward_kv_tile_shape", "backward_q_tile_shape", "kv_tile_shape", "q_tile_shape"),
    *("backward_kv_tile_size", "backward_q_tile_size", "kv_tile_size", "q_tile_size"),
}
BACKENDS = {f"{name}-{kind}" for name in ("cutlass", "hopper", "blackwell", "flex") for kind in ("fna", "fmha")}


class Refused(ValueError, RuntimeError):
    """An argument that NATTEN refuses too: with a ValueError in Python, a RuntimeError in its C++ until 0.17."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turns what our own checks raise into `Refused`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise Refused(str(error)) from error


def named(
    function: str,
    positional: tuple[Any, ...],
    keywords: Mapping[str, Any],
    orders: Mapping[str, tuple[str, ...]],
    line: str | None,
) -> dict[str, Any]:
    """All arguments after `kernel_size` by name, without those that cannot matter here.

    Args:
        function: Named in errors.
        positional: Values after `kernel_size`.
        keywords: Arguments by name.
        orders: Names of positional arguments by line.
        line: The caller's; None finds out which of the last two orders is meant, or refuses.
    """
    if line is None:
        line = _line_of(function, positional, keywords, orders)
    names = orders[line]
    if len(positional) > len(names):
        raise TypeError(f"{function} takes at most {len(names)} arguments after kernel_size, got {len(positional)}")
    given = dict(zip(names, positional, strict=False))
    if twice := sorted(given.keys() & keywords.keys()):
        raise TypeError(f"{function} got {', '.join(twice)} by position and by name")
    return {name: value for name, value in (given | dict(keywords)).items() if name not in KNOBS}


def _line_of(
    function: str, positional: tuple[Any, ...], keywords: Mapping[str, Any], orders: Mapping[str, tuple[str, ...]]
) -> str:
    """0.17 or 0.20, seen by what only one of them has."""
    if not positional:
        return "0.20"
    if len(positional) > 1:  # is_causal, or dilation
        second = positional[1][0] if isinstance(positional[1], (tuple, list)) else positional[1]
        return "0.17" if second is None or isinstance(second, bool) else "0.20"
    if keywords.keys() & (set(orders["0.17"]) - set(orders["0.20"])):
        return "0.17"
    only = positional[0]
    if "dilation" in keywords or only is None or _is_one(only):
        return "0.20"
    raise TypeError(
        f"{function} got {only!r} after kernel_size, which NATTEN 0.17 takes for the dilation and NATTEN since 0.20 "
        f"for the stride: pass it by name, dilation={only!r} or stride={only!r}, or install(version=...)"
    )


def _is_one(value: Any) -> bool:
    return all(n == 1 for n in (value if isinstance(value, (tuple, list)) else [value]))


def check_window(
    rank: int, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any, line: str | None = None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """One value per axis of each, None being what NATTEN takes it for."""
    with refusing():
        kernels = broadcast_ints("kernel_size", kernel_size, rank)
        window = (
            kernels,
            broadcast_ints("stride", 1 if stride is None else stride, rank),
            broadcast_ints("dilation", 1 if dilation is None else dilation, rank),
            broadcast_bools("is_causal", False if is_causal is None else is_causal, rank),
        )
    if line is not None and min(kernels) < 2:
        raise Refused(f"kernel_size must be at least 2 for NATTEN {line}, got {kernel_size!r}")
    return window


def check_odd(kernel_size: tuple[int, ...], line: str | None) -> None:
    """Refuses even windows where scores are asked for, which NATTEN cannot give."""
    if line is not None and any(k % 2 == 0 for k in kernel_size):
        raise Refused(f"kernel_size must be odd for NATTEN {line}, got {kernel_size!r}")


def our_backend(backend: str | None) -> str | None:
    """A backend of ours, or None for one of NATTEN's; it refuses anything else."""
    if backend in dispatch.NAMES:
        return backend
    if backend is not None and backend not in BACKENDS:
        known = ", ".join(sorted({*dispatch.NAMES, *BACKENDS}))
        raise NotImplementedError(f"backend must be one of {known}, got {backend!r}")
    return None
