"""Contents of each version of NATTEN: its modules and their names, with objects that mean what they meant in it."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

from dinat_triton.integrations import natten_0_14, natten_0_17, natten_0_20
from dinat_triton.integrations.natten import (
    context,
    flops,
    functional,
    modules,
    token_permute,
    types,
    utils,
    varlen,
)

NEWEST = "0.21.7"
LINES = ("0.14", "0.15", "0.17", "0.20")  # the first of some versions that agree
SOURCES = {"0.14": natten_0_14, "0.15": natten_0_14, "0.17": natten_0_17, "0.20": natten_0_20}
CLASSES = tuple(f"NeighborhoodAttention{rank}D" for rank in (1, 2, 3))

# Names of `natten.context`, by the lines that have them. They are also names of `natten`.
CONTEXT = {
    ("0.15", "0.17"): (
        *("enable_gemm_na", "disable_gemm_na", "enable_tf32", "disable_tf32", "enable_tiled_na", "disable_tiled_na"),
        *("has_cuda", "has_half", "has_bfloat", "has_gemm", "has_tf32_gemm", "has_fp32_gemm", "has_fp64_gemm"),
    ),
    ("0.17",): (
        *("has_fna", "has_fused_na", "use_fna", "is_fna_enabled", "use_fused_na", "is_fused_na_enabled"),
        *("use_autotuner", "disable_autotuner", "is_autotuner_enabled", "AutotunerContext"),
        *("is_autotuner_enabled_for_forward", "is_autotuner_enabled_for_backward"),
        *("is_autotuner_thorough_for_forward", "is_autotuner_thorough_for_backward"),
        *("use_tiled_na", "is_tiled_na_enabled", "use_gemm_na", "is_gemm_na_enabled"),
        *("use_tf32_in_gemm_na", "is_tf32_in_gemm_na_enabled", "use_flex_attention", "force_flex_attention"),
        *("should_use_flex_attention", "should_force_flex_attention"),
    ),
    ("0.17", "0.20"): (
        *("NattenContext", "MemoryUsagePreference", "set_memory_usage_preference", "get_memory_usage_preference"),
        *("is_memory_usage_default", "is_memory_usage_strict", "is_memory_usage_unrestricted"),
        *("use_deterministic_algorithms", "are_deterministic_algorithms_enabled"),
        *("use_kv_parallelism_in_fused_na", "is_kv_parallelism_in_fused_na_enabled"),
    ),
    ("0.20",): (
        *("HAS_LIBNATTEN", "allow_flex_compile", "allow_flex_compile_backprop", "disable_flex_compile"),
        *("disable_flex_compile_backprop", "is_flex_compile_allowed", "is_flex_compile_backprop_allowed"),
        *(
            f"get_{way}configs_for_{kernels}_{kind}"
            for kernels in ("cutlass", "cutlass_hopper", "cutlass_blackwell", "flex")
            for kind in ("fna", "fmha")
            for way in ("", "bwd_")
            if (kernels, way) != ("flex", "bwd_")
        ),
    ),
}


def line_of(version: str) -> str:
    """The line of a version."""
    try:
        number = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        number = ()
    if not (0, 14) <= number < (0, 22) or len(number) < 2:
        raise ValueError(f"version must be one of NATTEN's from 0.14 to 0.21, such as {NEWEST!r}, got {version!r}")
    return max((line for line in LINES if tuple(map(int, line.split("."))) <= number), key=LINES.index)


def namespace(version: str | None, with_scores: bool) -> dict[str, dict[str, Any]]:
    """The names of `natten`, under "", and of its modules, under theirs.

    Args:
        version: Of NATTEN; None has the names of all, and finds out from each call which is meant.
        with_scores: Whether to have functions that give scores, which some code takes wherever it finds them.
    """
    line = None if version is None else line_of(version)
    source = functional if line is None else SOURCES[line]
    classes = {name: getattr(modules if line is None else source, name) for name in CLASSES}
    switches = _context(line)
    functions = _functions(line, version or "", source, with_scores)
    names: dict[str, dict[str, Any]] = {
        "functional": functions | (switches if line == "0.15" else {}),
        "modules": classes,
        "flops": _public(flops),
        "token_permute": _public(token_permute),
        "types": _public(types),
        "utils": _public(utils),
        "utils.checks": _public(utils),
        "utils.log": {"get_logger": logging.getLogger},
        "utils.varlen": _public(varlen),
        "version": {"__version__": version or NEWEST},
    }
    for rank, (name, value) in enumerate(classes.items(), 1):
        names |= {f"natten{rank}d": {name: value}, f"na{rank}d": {name: value}}
    if line not in ("0.14", "0.15"):  # its presence tells which arguments modules take
        names["context"] = switches
    fused = [name for name in ("na1d", "na2d", "na3d", "attention", "merge_attentions") if line in (None, "0.20")]
    names[""] = names["version"] | classes | switches | {name: functions[name] for name in fused}
    return names


def _context(line: str | None) -> dict[str, Any]:
    names = [name for lines, group in CONTEXT.items() if line is None or line in lines for name in group]
    return {name: getattr(context, name, context.no_configs) for name in names}


def _functions(line: str | None, version: str, source: ModuleType, with_scores: bool) -> dict[str, Any]:
    """The names of `natten.functional`."""
    found = {name: value for name, value in _public(source).items() if name not in CLASSES}
    if line == "0.14":
        found = {name: value for name, value in found.items() if name.startswith(("natten1d", "natten2d"))}
    if line in ("0.15", "0.17"):
        found |= {name: value for name, value in _public(functional).items() if name.endswith("AutogradFunction")}
    if line == "0.17":
        has_lse = version.startswith(("0.17.4", "0.17.5"))
        found |= {f"FusedNeighborhoodAttention{rank}D": functional.FusedFunction(rank, has_lse) for rank in (1, 2, 3)}
    if version.startswith("0.17.5"):
        found = {name: value for name, value in found.items() if not name.startswith("natten")}
    if not with_scores:
        found = {name: value for name, value in found.items() if not name.endswith(("qk", "qkrpb", "bias", "av"))}
    return found


def _public(module: ModuleType) -> dict[str, Any]:
    return {name: getattr(module, name) for name in module.__all__}
