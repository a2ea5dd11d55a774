"""The work of attention layers: bytes, matrix products and exponentials, counted from plans.

*Useful* work is what the definition asks for: the scores that attend, and every tensor moved once. *Evaluated* work is
what a backend makes of it: whole tiles of scores, padding included, and every tensor moved once by each sweep over it.
What overlapping tiles load again comes out of a cache and is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dinat_triton.layers import Layer
from dinat_triton.passes import Traffic
from dinat_triton.plan import Cost, Plan
from dinat_triton.tiled import choose_tile

FORWARD, BACKWARD, FORWARD_BACKWARD = TIMED = ("forward", "backward", "forward+backward")
LIMITS = ("memory", "products", "exps")


# Query, key, value and output; and the gradients of all four, with the scores computed anew. `tiled` moves just that:
# its backward reads neither the output nor its sums.
NEEDED = {FORWARD: Traffic(2, 2, 0, (1, 1)), BACKWARD: Traffic(3, 4, 0, (3, 2))}


@dataclass(frozen=True)
class Sweep:
    """One run of a backend over the plan of a layer."""

    layer: Layer
    cost: Cost
    traffic: Traffic
    itemsize: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of a tensor, in all heads and images."""
        return self.layer.maps * self.layer.dim * self.itemsize

    @property
    def bytes(self) -> int:
        tensors = (self.traffic.rows + self.traffic.columns) * self.token_bytes
        return (tensors + 4 * self.traffic.numbers * self.layer.maps) * self.cost.queries

    @property
    def exps(self) -> int:
        return self.cost.scores * self.layer.maps

    @property
    def flops(self) -> int:
        return 2 * sum(self.traffic.products) * self.exps * self.layer.dim


@dataclass(frozen=True)
class Work:
    """The work of one layer in one pass. Scores are per query; evaluated ones are of the pass's first sweep."""

    useful_scores: float
    scores: float
    useful_flops: float
    useful_bytes: float
    useful_exps: float
    flops: float
    bytes: float
    exps: float

    @classmethod
    def of(cls, pass_: str, sweeps: Sequence[Sweep]) -> Work:
        first = sweeps[0]
        layer, cost = first.layer, first.cost
        needed = [NEEDED[each] for each in pass_.split("+")]
        pairs = cost.useful_scores * layer.maps
        return cls(
            useful_scores=cost.useful_per_query,
            scores=cost.scores_per_query,
            useful_flops=sum(2 * sum(traffic.products) * pairs * layer.dim for traffic in needed),
            useful_bytes=sum((traffic.rows + traffic.columns) * cost.queries * first.token_bytes for traffic in needed),
            useful_exps=len(needed) * pairs,
            flops=sum(sweep.flops for sweep in sweeps),
            bytes=sum(sweep.bytes for sweep in sweeps),
            exps=sum(sweep.exps for sweep in sweeps),
        )

    def limits(self, ceilings: Ceilings, dtype: str) -> dict[str, float]:
        """Seconds that each limit alone takes, of what is evaluated."""
        return ceilings.seconds(dtype, self.bytes, self.flops, self.exps)

    def useful_limits(self, ceilings: Ceilings, dtype: str) -> dict[str, float]:
        """Seconds that each limit alone takes, of what any implementation has to do."""
        return ceilings.seconds(dtype, self.useful_bytes, self.useful_flops, self.useful_exps)


@dataclass(frozen=True)
class Ceilings:
    """The most that a device does per second.

    Attributes:
        source: Where the numbers are from: measured, or a vendor's.
        device: Name of the device.
        copy_bytes_per_s: Rate of a large copy, read and written counted each.
        product_flops_per_s: Rate of a large matrix product in float32 (ieee, never tf32) and bfloat16.
        exps_per_s: Float32 exponentials of arguments in registers, or in the nearest cache.
    """

    source: str
    device: str
    copy_bytes_per_s: float
    product_flops_per_s: dict[str, float]
    exps_per_s: float

    def products(self, dtype: str) -> float:
        return self.product_flops_per_s["float32" if dtype == "float32" else "bfloat16"]

    def seconds(self, dtype: str, moved: float, flops: float, exps: float) -> dict[str, float]:
        """Seconds for so many bytes, operations and exponentials, each alone."""
        times = (moved / self.copy_bytes_per_s, flops / self.products(dtype), exps / self.exps_per_s)
        return dict(zip(LIMITS, times, strict=True))


def tiled_work(layer: Layer, pass_: str, dtype: torch.dtype = torch.float32) -> Work:
    """The work that the `tiled` backend makes of a layer on this CPU."""
    cost = Plan(layer.geometry, choose_tile(layer.geometry, layer.batch, layer.heads, dtype)).cost()
    return Work.of(pass_, [Sweep(layer, cost, NEEDED[each], dtype.itemsize) for each in pass_.split("+")])
