"""Choice of the plan and launch options of a kernel: tuned by the user, out of the shipped tables, or by a rule.

A table has configs of a pass, head dim and width, `forward/32/16`, others for calls without a bias,
`forward/32/16/unbiased`, forwards over closed tiles, `forward/32/16/closed`, and configs of single geometries with
about so many maps (batch * heads), `forward/32/16/56x56-k7x7-d8x8/256`, which go first. Tables that
`dinat-triton tune` wrote for the device or its architecture go before the shipped one, and the rule, safe on any GPU,
comes last.

A choice is made once per problem and cached; nothing is compiled or timed to make it.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

from dinat_triton import store
from dinat_triton.candidates import Candidates
from dinat_triton.geometry import Geometry
from dinat_triton.passes import Pass
from dinat_triton.plan import Plan

TABLES = Path(__file__).parent / "tuned"
# What decides how fast a config is.
SOURCES = (
    "plan.py",
    "candidates.py",
    "axis_cuts.py",
    *(f"kernels/{name}.py" for name in ("forward", "backward", "primitives", "layout", "schedule", "configs")),
)
# Architectures whose kernels differ from another's in the shared memory that they may use alone share its table.
LIKE = {
    **dict.fromkeys(("sm_86", "sm_87", "sm_89", "sm_120", "sm_121"), "sm_80"),
    **dict.fromkeys(("sm_103", "sm_110"), "sm_100"),
}
# One loaded token of one head weighs as much as this many scores per channel byte: the cache's bandwidth against the
# rate of exponentials, on the data-center GPUs alike.
SCORES_PER_BYTE = 1.4
ALL_REGISTERS = 255
MOST_CLOSED = 64
# Of tiles: with more, words could not tell who sees whom.
MOST_ROWS = 512


@dataclass(frozen=True)
class Config:
    """Launch options of one kernel.

    Attributes:
        rows: Row slots of a tile, at most; small problems take fewer.
        chunk: Columns at a time, unless a tile's columns fit into one chunk of `one_chunk`.
        one_chunk: The most columns that are taken at once, without a loop.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
        programs: Programs per multiprocessor to aim for; larger batches walk instead.
        registers: Of a thread, at most: NVIDIA's compiler takes that many, and as it likes if they are all.
    """

    rows: int = 64
    chunk: int = 32
    one_chunk: int = 64
    warps: int = 4
    stages: int = 2
    programs: int = 8
    registers: int = ALL_REGISTERS

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name, least in (("rows", 16), ("chunk", 16), ("one_chunk", 16), ("warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name} must be a power of two of at least {least}, got {value}")
        if self.rows > MOST_ROWS:
            raise ValueError(f"rows must be at most {MOST_ROWS}, got {self.rows}")


@dataclass(frozen=True)
class Architecture:
    """Facts of a GPU that the choice of a config depends on."""

    name: str  # sm_90, gfx942, ...
    shared_memory: int  # bytes that one program may use
    multiprocessors: int
    device: str = ""  # NVIDIA H200, ...; empty where the architecture is all that is known

    @property
    def is_amd(self) -> bool:
        return self.name.startswith("gfx")


@dataclass(frozen=True)
class Preset:
    """A GPU and configs to prepare launches for, whatever GPU is here and whatever the tables say.

    Attributes:
        architecture: The GPU; by default that of the tensors.
        configs: One for each Pass; by default those of the tables.
    """

    architecture: Architecture | None = None
    configs: tuple[Config, ...] = ()


@lru_cache
def architecture_of(device: torch.device) -> Architecture:
    """The architecture of a device; the interpreter on the CPU passes for a small unknown one."""
    if device.type != "cuda":
        return Architecture("cpu", 99 << 10, 1)
    properties = torch.cuda.get_device_properties(device)
    shared = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
    nvidia = f"sm_{properties.major}{properties.minor}"
    name = properties.gcnArchName.split(":")[0] if torch.version.hip else nvidia
    return Architecture(name, shared, properties.multi_processor_count, properties.name)


def rule(pass_: Pass, dim: int, bits: int, biased: bool = True) -> Config:
    """A config that fits every GPU that Triton knows: small tiles, little shared memory, few spills.

    Args:
        pass_: What it is for.
        dim: The larger of the head dims, padded to a power of two.
        bits: Width of the dtype.
        biased: Whether there is a bias, whose gradient queries would have to hold.
    """
    wide = bits == 32 or dim > (32 if pass_ == Pass.CLOSED_BACKWARD else 64)
    chunk = 16 if bits * dim > 4096 else 32
    # With fewer channels than rows Triton would lay warps along the rows, of which there are too few.
    if pass_ == Pass.QUERY_BACKWARD and biased and dim > 16:
        return Config(rows=16, chunk=chunk if wide else 128, one_chunk=chunk if wide else 128, stages=1)
    return Config(rows=16 if wide else 64, chunk=chunk, one_chunk=chunk if wide else 64, stages=1)


def shared_memory(dim: int, bits: int, is_amd: bool) -> int:
    """Bytes of it that a program of the rule's configs uses at most: one of keys does.

    NVIDIA's holds two tiles of rows and two of columns, one of them in two orders; AMD's moves one at a time.
    """
    config = rule(Pass.KEY_BACKWARD, dim, bits)
    tokens = max(config.rows, config.chunk) if is_amd else 2 * config.rows + 3 * config.chunk
    return tokens * dim * bits // 8


@lru_cache(maxsize=512)
def choose_config(
    pass_: Pass, dim: int, bits: int, architecture: str, device: str = "", geometry: Geometry | None = None,
    maps: int = 1, biased: bool = True, closed: bool = False,
) -> Config:  # fmt: skip
    """The config of a pass: the user's, or the shipped one, or the rule's.

    Args:
        pass_: What it is for.
        dim: The larger of the head dims, padded to a power of two.
        bits: Width of the dtype.
        architecture: sm_90, gfx942, ...
        device: Name of the device, if there is one.
        geometry: Whose own configs to look for; without one, only those for all geometries.
        maps: Batch times heads.
        biased: Whether there is a bias.
        closed: Whether tiles are closed, which a geometry tells.
    """
    key = table_key(pass_, dim, bits, biased)
    own_key = None if geometry is None else f"{key}/{store.geometry_key(geometry)}"
    closed_key = table_key(pass_, dim, bits, biased, closed or (geometry is not None and is_closed(geometry)))
    for table in (load_user_table(device), load_user_table(architecture), load_table(architecture)):
        own = None if own_key is None else store.nearest(table, own_key, maps)
        found = own or table.get(closed_key) or table.get(key)
        if found is not None:
            return found
    return rule(pass_, dim, bits, biased)


def table_key(pass_: Pass, dim: int, bits: int, biased: bool = True, closed: bool = False) -> str:
    """The key under which tables keep the config of a pass. A backward over closed tiles is a pass of its own."""
    kind = "/closed" if closed and pass_ == Pass.FORWARD else ""
    return f"{pass_}/{dim}/{bits}" + ("" if biased else "/unbiased") + kind


def is_closed(geometry: Geometry) -> bool:
    """Whether closed tiles, whose columns no other tile reads, are so small that one chunk holds their columns."""
    return prod(axis.closed_columns for axis in geometry.axes) <= MOST_CLOSED


def config_of(key: str, entry: Any) -> Config:
    """A config out of a table's entry; any key will do."""
    return Config(**entry)


def user_table(device: str) -> store.Table:
    """The table in which `dinat-triton tune` keeps configs, of a device or of an architecture that it only modelled."""
    return store.Table("configs", device, f"triton {triton.__version__}", SOURCES, config_of)


@lru_cache
def load_user_table(device: str) -> dict[str, Config]:
    """The user's configs for a device or an architecture, empty where there are none of use."""
    return user_table(device).read() if device else {}


@lru_cache
def load_table(architecture: str) -> dict[str, Config]:
    """The shipped table, empty where there is none; one that cannot be read is ignored with a warning."""
    path = TABLES / f"{LIKE.get(architecture, architecture)}.json"
    if not path.exists():
        return {}
    try:
        configs = json.loads(path.read_text())["configs"]
        return {key: config_of(key, entry) for key, entry in configs.items()}
    except store.BROKEN as error:
        warnings.warn(f"ignoring the tuned table {path}: {error!r}; the general rule is used instead", stacklevel=2)
        return {}


def padded(n: int) -> int:
    """The power of two that a matrix instruction's side of `n` is padded to."""
    return max(16, 1 << (n - 1).bit_length())


def plan_cost(plan: Plan, token_bytes: int) -> float:
    """Modelled time of a plan, in scores: those that it evaluates, and what its tiles load and store."""
    cost = plan.cost()
    return _modelled_scores(cost.scores, cost.queries + cost.col_loads, token_bytes)


def _modelled_scores(scores: Any, tokens: Any, token_bytes: int) -> Any:
    return scores + 2 * tokens * token_bytes * SCORES_PER_BYTE / 2


@lru_cache(maxsize=512)
def choose_plan(geometry: Geometry, config: Config, token_bytes: int, transposed: bool = False) -> Plan:
    """The plan with the least modelled time among the tiles that fit the config's rows."""
    found = Candidates(geometry, config.rows, transposed)
    block, width = powers_of_two(found.rows), powers_of_two(found.columns)
    chunk = np.where(found.columns <= config.one_chunk, width, config.chunk)
    tokens = geometry.num_tokens + found.col_loads
    best = int(_modelled_scores(block * found.padded_columns(chunk), tokens, token_bytes).argmin())
    return Plan(geometry, tuple(found.tiles[best].tolist()), int(block[best]), int(chunk[best]), transposed)


def powers_of_two(n: np.ndarray) -> np.ndarray:
    """`padded` of many numbers."""
    return np.maximum(16, 1 << np.ceil(np.log2(n)).astype(np.int64))
