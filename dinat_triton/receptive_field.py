"""Receptive fields: which tokens one has heard of after a stack of layers, exactly, and how much of each.

Every layer here sees a product of intervals or strided runs, one per axis, and products stay products from layer to
layer. So a receptive field is one small matrix product per axis, however large the map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

import numpy as np
from numpy.typing import NDArray

from dinat_triton.geometry import SHIFT, Axis, Geometry

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TokenLinks:
    """Links from each output of a layer to the inputs it sees: on every axis a matrix `[outputs, inputs]`."""

    links: tuple[BoolArray, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the map that leaves the layer."""
        return tuple(len(link) for link in self.links)


@dataclass(frozen=True, eq=False)
class Field:
    """The receptive field of one token on the map that enters a stack.

    Attributes:
        weights: On every axis, the share of the token that comes from each input if every layer averages what it sees.
    """

    weights: tuple[FloatArray, ...]

    @property
    def heat(self) -> FloatArray:
        """Share of the token that comes from each input; sums to 1."""
        return reduce(np.multiply.outer, self.weights)

    @property
    def mask(self) -> BoolArray:
        """Inputs that reach the token at all."""
        return reduce(np.logical_and.outer, [w > 0 for w in self.weights])

    @property
    def size(self) -> int:
        return prod(int((w > 0).sum()) for w in self.weights)

    @property
    def coverage(self) -> float:
        """Percentage of the inputs that reach the token."""
        return 100 * self.size / prod(map(len, self.weights))


def attention(geometry: Geometry) -> TokenLinks:
    """A layer of neighborhood attention."""
    return TokenLinks(tuple(_links(axis) for axis in geometry.axes))


def shifted_windows(shape: Sequence[int], window: int, shift: int) -> TokenLinks:
    """A layer of Swin's attention: windows that do not overlap, every other layer shifted.

    Blocked attention on a map that is longer by a window, cropped to the tokens that exist.
    """
    if not 0 <= shift < window:
        raise ValueError(f"shift must be at least 0 and below window {window}, got {shift}")
    links = []
    for size in shape:
        before = (window - shift) % window
        blocks = -(-(before + size) // window)
        whole = _links(Axis(blocks * window, window, 1, window, False))
        links.append(whole[before : before + size, before : before + size])
    return TokenLinks(tuple(links))


def downsampling(shape: Sequence[int]) -> TokenLinks:
    """A 3x3 convolution of stride 2 between two stages of NAT and DiNAT."""
    links = []
    for size in shape:
        centre = 2 * np.arange((size + 1) // 2)[:, None]
        links.append(abs(np.arange(size) - centre) <= 1)
    return TokenLinks(tuple(links))


def dilated_stack(
    shape: Sequence[int], kernel_size: int, dilations: Iterable[int], border: Sequence[str] = (SHIFT,)
) -> list[TokenLinks]:
    """Layers of neighborhood attention on one map, one per dilation."""
    return [attention(Geometry(tuple(shape), (kernel_size,), (d,), border=tuple(border))) for d in dilations]


def swin_stack(shape: Sequence[int], window: int, depth: int) -> list[TokenLinks]:
    """Layers of Swin's attention, plain and shifted in turn."""
    return [shifted_windows(shape, window, window // 2 * (i % 2)) for i in range(depth)]


def staged_stack(shape: Sequence[int], kernel_size: int, stages: Iterable[Iterable[int]]) -> list[TokenLinks]:
    """A whole model: a stack of dilations per stage, with downsampling between them."""
    layers: list[TokenLinks] = []
    for dilations in stages:
        if layers:
            layers.append(downsampling(layers[-1].shape))
        layers += dilated_stack(layers[-1].shape if layers else shape, kernel_size, dilations)
    return layers


def field(layers: Sequence[TokenLinks], token: Sequence[int] | None = None) -> Field:
    """The receptive field of a token of the last layer; by default of the one in the middle."""
    shape = layers[-1].shape
    token = tuple(n // 2 for n in shape) if token is None else tuple(token)
    if len(token) != len(shape) or not all(0 <= t < n for t, n in zip(token, shape, strict=True)):
        raise ValueError(f"token must lie on the map {shape} that leaves the last layer, got {token}")
    weights = [np.eye(n)[t] for n, t in zip(shape, token, strict=True)]
    for layer in reversed(layers):
        weights = [w / link.sum(1) @ link for w, link in zip(weights, layer.links, strict=True)]
    return Field(tuple(weights))


def growth(layers: Sequence[TokenLinks], token: Sequence[int] | None = None) -> list[Field]:
    """The receptive field after one layer, after two, and so on."""
    return [field(layers[: depth + 1], token) for depth in range(len(layers))]


def _links(axis: Axis) -> BoolArray:
    positions, _ = axis.neighbors()
    links = np.zeros((axis.size, axis.size), dtype=bool)
    rows, places = np.nonzero(positions >= 0)
    links[rows, positions[rows, places]] = True
    return links
