"""The map that a tensor is a local part of, and what layers with a window other than attention's need of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dinat_triton.distributed.attention import Split
from dinat_triton.distributed.exchange import Route, exchange, route
from dinat_triton.distributed.shares import chunks
from dinat_triton.geometry import IntArray

Ints = Sequence[int]


@dataclass(frozen=True)
class ShardedMap:
    """A map that is cut along its first axes, each over one dimension of a mesh.

    Attributes:
        shape: Tokens along each axis of the whole map.
        mesh: The ranks.
    """

    shape: tuple[int, ...]
    mesh: DeviceMesh

    @staticmethod
    def of(x: DTensor, first: int = 1, name: str = "x") -> ShardedMap:
        """The map of a tensor whose map axes are two, from its axis `first` on."""
        expected = tuple(Shard(first + dim) for dim in range(x.device_mesh.ndim))
        if x.placements != expected:
            raise ValueError(f"{name} must be sharded over its first map axes, by {expected}, got {x.placements}")
        return ShardedMap(tuple(x.shape[first : first + 2]), x.device_mesh)

    @cached_property
    def splits(self) -> tuple[Split | None, ...]:
        mesh = self.mesh
        splits = [Split(mesh.get_group(dim), mesh.size(dim), mesh.get_local_rank(dim)) for dim in range(mesh.ndim)]
        return (*splits, *[None] * (len(self.shape) - len(splits)))

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        return [split.group for split in self.splits if split is not None]

    def resized(self, shape: Ints) -> ShardedMap:
        return replace(self, shape=tuple(shape))

    @torch.compiler.disable
    def whole(self, x: Tensor) -> DTensor:
        """The DTensor of which every rank has a part `[batch, *local map, channels]`."""
        shape = torch.Size([len(x), *self.shape, x.shape[-1]])
        placements = [Shard(1 + dim) for dim in range(self.mesh.ndim)]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(x, self.mesh, placements, run_check=False, shape=shape, stride=stride)


@dataclass(frozen=True, eq=False)
class Fetch:
    """The move after which a rank has the positions that its outputs read, and zeros to pad them with at both ends."""

    move: Route
    before: int
    after: int


@lru_cache(maxsize=512)
def _fetch(
    size: int, outputs: int, kernel: int, stride: int, padding: int, ranks: int, rank: int, device: torch.device
) -> Fetch:
    """Positions of an axis that a rank needs to compute its part of a window layer's outputs."""

    def bounds(own: IntArray) -> tuple[int, int]:
        return (int(own[0]) * stride - padding, int(own[-1]) * stride - padding + kernel) if len(own) else (0, 0)

    spans = [bounds(own) for own in chunks(outputs, ranks)]
    wanted = [np.arange(max(start, 0), min(stop, size)) for start, stop in spans]
    start, stop = spans[rank]
    move = route(chunks(size, ranks), wanted, rank, device)
    return Fetch(move, max(-start, 0), max(stop - max(start, size), 0))


@torch.compiler.disable
def read(x: Tensor, on: ShardedMap, shape: Ints, kernel: Ints, stride: Ints, padding: Ints) -> Tensor:
    """Reads what a rank's part of a window layer's outputs needs, padded with zeros at the ends of the map.

    Args:
        x: `[batch, *local map, channels]`.
        on: The map.
        shape: The whole map of outputs.
        kernel, stride, padding: Of the layer, along each axis.
    """
    amounts = [0, 0]
    for axis, split in reversed([*enumerate(on.splits)]):
        options = on.shape[axis], shape[axis], kernel[axis], stride[axis], padding[axis]
        fetch = _fetch(*options, *((split.ranks, split.rank) if split else (1, 0)), x.device)
        if split is not None and split.ranks > 1:
            (x,) = exchange([x], 1 + axis, fetch.move, split.group)
        else:
            x = x.narrow(1 + axis, 0, fetch.move.wanted)
        amounts += [fetch.before, fetch.after]
    return nn.functional.pad(x, amounts) if any(amounts) else x


def convolve(conv: nn.Conv2d, x: Tensor, on: ShardedMap, shape: Ints) -> Tensor:
    """A convolution of a map, or its part on a rank; channels come last, and `shape` is the whole map of outputs."""
    x = read(x, on, shape, conv.kernel_size, conv.stride, _padding(conv))
    if idle := 0 in x.shape[1:3]:
        # Computed all the same, so that every rank takes part in the gradients' collectives, in one order.
        missing = [k - n for n, k in zip(x.shape[1:3], conv.kernel_size, strict=True)]
        x = nn.functional.pad(x, [0, 0, 0, max(missing[1], 0), 0, max(missing[0], 0)])
    out = nn.functional.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, conv.stride).permute(0, 2, 3, 1)
    if idle:
        for axis, split in enumerate(on.splits):
            out = out.narrow(1 + axis, 0, len(chunks(shape[axis], split.ranks)[split.rank])) if split else out
    return out


def convolved_shape(conv: nn.Conv2d, shape: Ints) -> tuple[int, ...]:
    """The map that a convolution makes of a map."""
    options = zip(shape, conv.kernel_size, conv.stride, _padding(conv), strict=True)
    return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in options)


def _padding(conv: nn.Conv2d) -> tuple[int, ...]:
    assert not isinstance(conv.padding, str)
    return conv.padding


def resize(x: Tensor, on: ShardedMap, shape: Ints) -> Tensor:
    """A map padded with zeros or cropped at its ends; both maps are cut as DTensor cuts them."""
    if tuple(shape) == on.shape:
        return x
    return read(x, on, shape, (1, 1), (1, 1), (0, 0))
