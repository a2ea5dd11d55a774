"""The plans of a batch of maps of different sizes, which one launch takes together: the union of their tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dinat_triton.kernels.configs import Config, choose_plan
from dinat_triton.map_batch import MapBatch
from dinat_triton.plan import Plan


@dataclass(frozen=True)
class SizePlan:
    """The plan of one size, and the maps that have it.

    Attributes:
        plan: Of every map of this size.
        token_strides: Tokens from one position of an axis to the next; in a padded map they are those of its padding.
        first_tokens: The first token of each map.
    """

    plan: Plan
    token_strides: tuple[int, ...]
    first_tokens: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class MapPlans:
    """Plans that have block, chunk and direction in common."""

    sizes: tuple[SizePlan, ...]

    @property
    def block(self) -> int | None:
        return self.sizes[0].plan.block

    @property
    def chunk(self) -> int:
        return self.sizes[0].plan.chunk

    @property
    def num_tiles(self) -> int:
        return sum(size.plan.num_tiles * len(size.first_tokens) for size in self.sizes)

    @property
    def largest(self) -> tuple[int, int]:
        """The most rows and the most columns of any tile."""
        rows, columns = zip(*(size.plan.largest for size in self.sizes), strict=True)
        return max(rows), max(columns)

    @property
    def is_closed(self) -> bool:
        """Whether no two tiles share a column."""
        return all(size.plan.is_closed for size in self.sizes)


def alone(plan: Plan) -> MapPlans:
    """A plan as that of a batch item with one map."""
    return MapPlans((SizePlan(plan, plan.geometry.token_strides),))


def choose_plans(batch: MapBatch, config: Config, token_bytes: int, transposed: bool = False) -> MapPlans:
    """Every map's own plan, with room for the largest tile in all of them."""
    maps = batch.by_size()
    plans = [choose_plan(geometry, config, token_bytes, transposed) for geometry, _, _ in maps]
    one_chunk = all(plan.largest[1] <= plan.chunk for plan in plans)
    chunk = max(plan.chunk for plan in plans) if one_chunk else config.chunk
    block = max(plan.block or 0 for plan in plans)
    sizes = zip(plans, maps, strict=True)
    return MapPlans(tuple(SizePlan(replace(p, block=block, chunk=chunk), *places) for p, (_, *places) in sizes))
