"""Sums over ranks: of gradients of what several ranks hold alike, and of what each rank has a part of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch import distributed as dist


def shared(x: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """Shares a tensor: its gradient is the sum of those of all ranks of each group in turn."""
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


def total(x: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """The sum over all ranks of each group in turn. Its gradient is taken to be alike on all of them."""
    return _Total.apply(x, groups)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups):
        for group in groups:
            x = sum_in_order(x, group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def sum_gradients(parameters: Iterable[nn.Parameter], groups: Sequence[dist.ProcessGroup]) -> None:
    """Has the gradients of parameters summed over ranks before they are accumulated, from the next backward on."""

    def summed(grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        for group in groups:
            dist.all_reduce(grad, group=group)
        return grad

    for parameter in parameters:
        if parameter.requires_grad and not hasattr(parameter, "_dinat_triton_sums"):
            parameter.register_hook(summed)
            parameter._dinat_triton_sums = True  # type: ignore[attr-defined]


def sum_in_order(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over a group, added in the order of its ranks, so that every run and every rank gets the same bits."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return reduce(torch.add, parts)
