"""Maps padded to the span of a window, and cropped again.

A compiled or exported graph may serve maps of all sizes. There padding must not ask whether a map is too small, because
the answer would hold for some sizes only: both directions are one op then, which is its own gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dinat_triton.fused import LIBRARY

LIBRARY.define("resize(Tensor x, SymInt[] shape) -> Tensor")
RESIZE = torch.ops.dinat_triton.resize.default


def pad_to_span(x: Tensor, span: list[int], channels: int) -> Tensor:
    """Pads `[batch, *shape, channels]` with zeros at the end of every axis that is shorter than the window's span."""
    if x.dim() != len(span) + 2 or x.shape[-1] != channels:
        raise ValueError(f"x must be [batch, {len(span)} map axes, {channels} channels], got shape {x.shape}")
    if not torch.jit.is_scripting() and torch.compiler.is_compiling():
        return _resize_in_graph(x, [_at_least(n, least) for n, least in zip(x.shape[1:-1], span, strict=True)])
    amounts = [0, 0]
    short = False
    for axis in range(len(span), 0, -1):
        missing = max(0, span[axis - 1] - x.shape[axis])
        amounts += [0, missing]
        short = short or missing > 0
    return nn.functional.pad(x, amounts) if short else x


def crop_like(x: Tensor, like: Tensor) -> Tensor:
    """Drops what `pad_to_span` added."""
    if not torch.jit.is_scripting() and torch.compiler.is_compiling():
        return _resize_in_graph(x, like.shape[1:-1])
    for axis in range(1, like.dim() - 1):
        x = x.narrow(axis, 0, like.shape[axis])
    return x


def _at_least(n, least):
    if statically_known_true(n >= least):
        return n
    return least if statically_known_true(n <= least) else torch.sym_max(n, least)


def _resize_in_graph(x, shape):
    sizes = list(zip(x.shape[1:-1], shape, strict=True))
    longer = [not statically_known_true(n >= m) for n, m in sizes]
    shorter = [not statically_known_true(n <= m) for n, m in sizes]
    if any(map(all, zip(longer, shorter, strict=True))):
        return RESIZE(x, shape)
    # Known once and for all, so that nothing of this package need be in the graph.
    for axis, (_, m) in enumerate(sizes):
        x = x.narrow(1 + axis, 0, m) if shorter[axis] else x
    amounts = [0, 0]
    for (n, m), grows in zip(sizes[::-1], longer[::-1], strict=True):
        amounts += [0, m - n if grows else 0]
    return nn.functional.pad(x, amounts) if any(longer) else x


def _resize(x, shape):
    out = x.new_zeros(x.shape[0], *shape, x.shape[-1])
    common = (slice(None), *(slice(min(pair)) for pair in zip(x.shape[1:-1], shape, strict=True)))
    out[common] = x[common]
    return out


def _resize_fake(x, shape):
    return x.new_empty(x.shape[0], *shape, x.shape[-1])


def _save_shape(ctx, inputs, output):
    ctx.shape = inputs[0].shape[1:-1]


def _resize_backward(ctx, grad):
    return RESIZE(grad, ctx.shape), None


LIBRARY.impl("resize", _resize, "CompositeExplicitAutograd")
torch.library.register_fake("dinat_triton::resize", _resize_fake, lib=LIBRARY)
torch.library.register_autograd("dinat_triton::resize", _resize_backward, setup_context=_save_shape, lib=LIBRARY)
