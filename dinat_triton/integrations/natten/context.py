"""`natten.context`: NATTEN's switches. None of them can change a result here; they keep what they are told.

All kernels here are deterministic, whatever they are told, and there are no others to choose from.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, ClassVar

import torch

HAS_LIBNATTEN = True  # what it stands for, fused attention and token permutation, is there


class MemoryUsagePreference(enum.Enum):
    Default = 0
    Strict = 1
    Unrestricted = 2


class _Flags:
    """Class attributes with their defaults."""

    DEFAULTS: ClassVar[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        cls.reset()

    @classmethod
    def reset(cls) -> None:
        for name, value in cls.DEFAULTS.items():
            setattr(cls, name, value)


class NattenContext(_Flags):
    DEFAULTS: ClassVar = {
        "is_deterministic_mode_enabled": False,
        "is_fused_na_enabled": False,
        "is_kv_parallelism_enabled": False,
        "use_flex_attention": False,
        "force_flex_attention": False,
        "flex_compile_allowed": False,
        "flex_compile_backprop_allowed": False,
        "training_memory_preference": MemoryUsagePreference.Default,
        "tf32_in_gemm_na": True,
        "tiled_na": True,
        "gemm_na": True,
    }


class AutotunerContext(_Flags):
    DEFAULTS: ClassVar = {
        "enabled_for_forward": False,
        "enabled_for_backward": False,
        "thorough_mode_forward": False,
        "thorough_mode_backward": False,
        "warmup_steps_forward": 5,
        "warmup_steps_backward": 5,
        "steps_forward": 5,
        "steps_backward": 5,
    }


def _getter(context: type[_Flags], flag: str) -> Callable[[], Any]:
    def get() -> Any:
        return getattr(context, flag)

    get.__doc__ = f"`{context.__name__}.{flag}`."
    return get


def _switch(flag: str) -> tuple[Callable[..., None], Callable[[], bool], Callable[[], bool], Callable[[], bool]]:
    """Functions that set and read a flag, and those that set it and said what it now is until 0.17."""
    get = _getter(NattenContext, flag)

    def use(mode: bool = True) -> None:
        setattr(NattenContext, flag, bool(mode))

    def enable() -> bool:
        use(True)
        return get()

    def disable() -> bool:
        use(False)
        return get()

    return use, get, enable, disable


use_tiled_na, is_tiled_na_enabled, enable_tiled_na, disable_tiled_na = _switch("tiled_na")
use_gemm_na, is_gemm_na_enabled, enable_gemm_na, disable_gemm_na = _switch("gemm_na")
use_tf32_in_gemm_na, is_tf32_in_gemm_na_enabled, enable_tf32, disable_tf32 = _switch("tf32_in_gemm_na")
use_deterministic_algorithms, are_deterministic_algorithms_enabled, _, _ = _switch("is_deterministic_mode_enabled")
is_fused_na_enabled = is_fna_enabled = _getter(NattenContext, "is_fused_na_enabled")
is_kv_parallelism_in_fused_na_enabled = _getter(NattenContext, "is_kv_parallelism_enabled")
is_flex_compile_allowed = _getter(NattenContext, "flex_compile_allowed")
is_flex_compile_backprop_allowed = _getter(NattenContext, "flex_compile_backprop_allowed")
should_use_flex_attention = _getter(NattenContext, "use_flex_attention")
should_force_flex_attention = _getter(NattenContext, "force_flex_attention")
get_memory_usage_preference = _getter(NattenContext, "training_memory_preference")
is_autotuner_enabled_for_forward = _getter(AutotunerContext, "enabled_for_forward")
is_autotuner_enabled_for_backward = _getter(AutotunerContext, "enabled_for_backward")
is_autotuner_thorough_for_forward = _getter(AutotunerContext, "thorough_mode_forward")
is_autotuner_thorough_for_backward = _getter(AutotunerContext, "thorough_mode_backward")


def use_fused_na(
    mode: bool = True, kv_parallel: bool = True, use_flex_attention: bool = False, force_flex_attention: bool = False
) -> None:
    """Modules attend without scores here either way."""
    use_kv_parallelism_in_fused_na(mode and kv_parallel)
    NattenContext.is_fused_na_enabled = mode  # type: ignore[attr-defined]
    NattenContext.use_flex_attention = mode and use_flex_attention  # type: ignore[attr-defined]
    NattenContext.force_flex_attention = mode and force_flex_attention  # type: ignore[attr-defined]


use_fna = use_fused_na


def use_flex_attention() -> None:
    use_fused_na(use_flex_attention=True)


def force_flex_attention() -> None:
    use_fused_na(use_flex_attention=True, force_flex_attention=True)


def use_kv_parallelism_in_fused_na(mode: bool = True) -> None:
    """Has no effect here, but is refused as by NATTEN where its deterministic mode is on."""
    if mode and are_deterministic_algorithms_enabled():
        raise RuntimeError("NATTEN's deterministic mode is on, and parallelism over keys is not deterministic there")
    if not mode or not torch.are_deterministic_algorithms_enabled():
        NattenContext.is_kv_parallelism_enabled = mode  # type: ignore[attr-defined]


def set_memory_usage_preference(pref: str = "default") -> None:
    """There is no memory to save here by it."""
    names = {choice.name.lower(): choice for choice in MemoryUsagePreference}
    if pref not in names:
        raise ValueError(f"pref must be one of {', '.join(names)}, got {pref!r}")
    NattenContext.training_memory_preference = names[pref]  # type: ignore[attr-defined]


def is_memory_usage_default() -> bool:
    return get_memory_usage_preference() is MemoryUsagePreference.Default


def is_memory_usage_strict() -> bool:
    return get_memory_usage_preference() is MemoryUsagePreference.Strict


def is_memory_usage_unrestricted() -> bool:
    return get_memory_usage_preference() is MemoryUsagePreference.Unrestricted


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> None:
    NattenContext.flex_compile_allowed = mode  # type: ignore[attr-defined]
    NattenContext.flex_compile_backprop_allowed = mode and backprop  # type: ignore[attr-defined]


def allow_flex_compile_backprop(mode: bool = True) -> None:
    allow_flex_compile(is_flex_compile_allowed(), mode)


def disable_flex_compile() -> None:
    allow_flex_compile(False)


def disable_flex_compile_backprop() -> None:
    allow_flex_compile(is_flex_compile_allowed(), False)


def use_autotuner(
    forward_pass: bool | None = None,
    backward_pass: bool | None = None,
    thorough_mode_forward: bool | None = None,
    thorough_mode_backward: bool | None = None,
    warmup_steps_forward: int | None = None,
    warmup_steps_backward: int | None = None,
    steps_forward: int | None = None,
    steps_backward: int | None = None,
) -> None:
    """`dinat-triton tune` is this package's; NATTEN's has nothing to choose from here."""
    passes = {"enabled_for_forward": forward_pass, "enabled_for_backward": backward_pass}
    given = passes | {
        "thorough_mode_forward": thorough_mode_forward,
        "thorough_mode_backward": thorough_mode_backward,
        "warmup_steps_forward": warmup_steps_forward,
        "warmup_steps_backward": warmup_steps_backward,
        "steps_forward": steps_forward,
        "steps_backward": steps_backward,
    }
    for name, value in given.items():
        kind = int if "steps" in name else bool
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} must be {kind.__name__}, got {value!r}")
    if any(passes.values()):
        if torch.are_deterministic_algorithms_enabled():
            return  # NATTEN logs that it will not tune
        if are_deterministic_algorithms_enabled():
            raise RuntimeError("NATTEN's deterministic mode is on, and its autotuner is not deterministic")
    for name, value in given.items():
        if value is not None:
            setattr(AutotunerContext, name, value)


def disable_autotuner() -> None:
    use_autotuner(False, False, False, False)


def is_autotuner_enabled() -> bool:
    return is_autotuner_enabled_for_forward() or is_autotuner_enabled_for_backward()


def has_cuda() -> bool:
    return torch.cuda.is_available()


def _always(device_index: Any = None) -> bool:
    """Says yes to a dtype or fused function: this package has them on any device."""
    return True


has_half = has_bfloat = has_fna = has_fused_na = has_gemm = has_tf32_gemm = has_fp32_gemm = has_fp64_gemm = _always


def no_configs(*tensors: Any, **options: Any) -> list[Any]:
    """Tile shapes of NATTEN's kernels that can run a call: there are none here to choose from."""
    return []
