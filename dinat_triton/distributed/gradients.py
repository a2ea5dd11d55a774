"""Gradients of what several ranks hold alike, summed over them once and in the order of the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch import distributed as dist


def shared(x: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """The same tensor; its gradient is the sum of those of all ranks of each group in turn."""
    return _Shared.apply(x, groups) if groups else x


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups):
        ctx.groups = groups
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        for group in ctx.groups:
            grad = sum_in_order(grad, group)
        return grad, None


def sum_in_order(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over a group, added in the order of its ranks, so that every run and every rank gets the same bits."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return reduce(torch.add, parts)
