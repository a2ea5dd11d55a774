"""Which plan and which launch options a kernel gets: a shipped table per architecture, or a rule safe anywhere.

A choice is made once per problem and cached; nothing is compiled or timed to make it.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import triton

from dinat_triton.geometry import Geometry
from dinat_triton.plan import Plan, tile_candidates

TABLES = Path(__file__).parent / "tuned"
PASSES = ("forward", "closed_backward", "query_backward", "key_backward")
# One loaded token of one head weighs as much as this many scores per channel byte: the cache's bandwidth against the
# rate of exponentials, on the data-center GPUs alike.
SCORES_PER_BYTE = 1.4


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
    """

    rows: int = 64
    chunk: int = 32
    one_chunk: int = 64
    warps: int = 4
    stages: int = 2
    programs: int = 8

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name, least in (("rows", 16), ("chunk", 16), ("one_chunk", 16), ("warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name} must be a power of two of at least {least}, got {value}")


@dataclass(frozen=True)
class Architecture:
    """What the choice of a config depends on."""

    name: str  # sm_90, gfx942, ...
    shared_memory: int  # bytes that one program may use
    multiprocessors: int

    @property
    def is_amd(self) -> bool:
        return self.name.startswith("gfx")


@lru_cache
def architecture_of(device: torch.device) -> Architecture:
    """The architecture of a device; the interpreter on the CPU passes for a small unknown one."""
    if device.type != "cuda":
        return Architecture("cpu", 99 << 10, 1)
    properties = torch.cuda.get_device_properties(device)
    shared = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
    nvidia = f"sm_{properties.major}{properties.minor}"
    name = properties.gcnArchName.split(":")[0] if torch.version.hip else nvidia
    return Architecture(name, shared, properties.multi_processor_count)


def rule(name: str, dim: int, bits: int) -> Config:
    """A config that fits every GPU that Triton knows: small tiles, little shared memory, no spills.

    Args:
        name: The pass, one of PASSES.
        dim: The larger of the head dims, padded to a power of two.
        bits: Width of the dtype.
    """
    wide = bits == 32 or dim > (32 if name == "closed_backward" else 64)
    # With fewer channels than rows Triton would lay warps along the rows, of which there are too few.
    if name == "query_backward" and dim > 16:
        return Config(rows=16, chunk=32 if wide else 128, one_chunk=32 if wide else 128, stages=1)
    return Config(rows=16 if wide else 64, chunk=32, one_chunk=32 if wide else 64, stages=1)


@lru_cache(maxsize=512)
def choose_config(name: str, dim: int, bits: int, architecture: str) -> Config:
    """The shipped config of a pass for an architecture, or the rule's."""
    entry = load_table(architecture).get(f"{name}/{dim}/{bits}")
    return rule(name, dim, bits) if entry is None else Config(**entry)


@lru_cache
def load_table(architecture: str) -> dict[str, dict[str, int]]:
    """The shipped table, empty where there is none; one that cannot be read is ignored with a warning."""
    path = TABLES / f"{architecture}.json"
    if not path.exists():
        return {}
    try:
        configs = json.loads(path.read_text())["configs"]
        for entry in configs.values():
            Config(**entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"ignoring the tuned table {path}: {error!r}; the general rule is used instead", stacklevel=2)
        return {}
    return configs


def padded(n: int) -> int:
    """The power of two that a matrix instruction's side of `n` is padded to."""
    return max(16, triton.next_power_of_2(n))


@lru_cache(maxsize=512)
def choose_plan(geometry: Geometry, config: Config, token_bytes: int, transposed: bool = False) -> Plan:
    """The plan with the least modelled time among the tiles that fit the config's rows."""

    def candidate(tile: tuple[int, ...]) -> Plan:
        rows, columns = Plan(geometry, tile, transposed=transposed).largest
        chunk = padded(columns) if columns <= config.one_chunk else config.chunk
        return Plan(geometry, tile, padded(rows), chunk, transposed)

    def cost(plan: Plan) -> float:
        c = plan.cost()
        return c.scores + 2 * (c.queries + c.col_loads) * token_bytes * SCORES_PER_BYTE / 2

    return min(map(candidate, tile_candidates(geometry, config.rows)), key=cost)
