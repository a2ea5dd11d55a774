"""Implementations of the attention layers by others. None calls ours; those that gather read its windows."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dinat_triton.layers import Layer


@dataclass(frozen=True)
class Inputs:
    """Tensors of a layer, heads last; those that have gradients are `leaves`."""

    query: Tensor
    key: Tensor
    value: Tensor
    rpb: Any  # a tensor, or None in layers without a bias
    grad_out: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(x for x in (self.query, self.key, self.value, self.rpb) if x is not None)

    @classmethod
    def of(
        cls, layer: Layer, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", *,
        requires_grad: bool = False,
    ) -> Inputs:  # fmt: skip
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        def leaf(*shape: int) -> Tensor:
            return normal(*shape).requires_grad_(requires_grad)

        shape = (layer.batch, *layer.shape, layer.heads, layer.dim)
        bias = leaf(layer.heads, *(2 * k - 1 for k in layer.kernel_size)) if layer.has_bias else None
        return cls(leaf(*shape), leaf(*shape), leaf(*shape), bias, normal(*shape))


@dataclass(frozen=True)
class Attention:
    """A warm way to attend: the call, and the tensors that have gradients in it."""

    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]


@dataclass(frozen=True)
class Peer:
    """A way to compute a layer.

    Attributes:
        prepare: Does once what does not depend on the tensors' values.
        obstacle: Says why a layer cannot run, where trying would take long; None if it can.
        graph: Whether it is captured as a CUDA graph and replayed.
    """

    name: str
    prepare: Callable[[Layer, Inputs], Attention]
    obstacle: Callable[[Layer, Inputs], str | None] = lambda layer, inputs: None
    has_bias: bool = True
    same_function: bool = True
    graph: bool = False


def neighbors(layer: Layer, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens of each query's keys, and their places in the flattened bias table; `[tokens, keys]`."""
    keys, pairs = (torch.as_tensor(index, device=device) for index in layer.geometry.neighbors())
    return keys, pairs


def prepare_gather(layer: Layer, inputs: Inputs) -> Attention:
    """As one first writes it: copy each query's keys and values by advanced indexing, then two einsums."""
    keys, pairs = neighbors(layer, inputs.query.device)
    scale = layer.dim**-0.5

    def call() -> Tensor:
        query, key, value = (x.flatten(1, -3) for x in (inputs.query, inputs.key, inputs.value))
        logits = scale * torch.einsum("bnhd,bnkhd->bhnk", query, key[:, keys])
        if inputs.rpb is not None:
            logits = logits + inputs.rpb.flatten(1)[:, pairs]
        probabilities = logits.softmax(-1)
        return torch.einsum("bhnk,bnkhd->bnhd", probabilities, value[:, keys]).view_as(inputs.query)

    return Attention(call, inputs.leaves)


def prepare_gather_tuned(layer: Layer, inputs: Inputs) -> Attention:
    """Gather with the operations that torch runs fastest, above all in the backward: index_select and matmul."""
    keys, pairs = neighbors(layer, inputs.query.device)
    flat_keys, flat_pairs = keys.flatten(), pairs.flatten()
    scale = layer.dim**-0.5

    def call() -> Tensor:
        query, key, value = (x.flatten(1, -3).transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
        near = (layer.batch, layer.heads, *keys.shape, layer.dim)
        key, value = (x.contiguous().index_select(2, flat_keys).view(near) for x in (key, value))
        logits = (scale * query.unsqueeze(-2)) @ key.transpose(-1, -2)
        if inputs.rpb is not None:
            bias = inputs.rpb.flatten(1).index_select(1, flat_pairs)
            logits = logits + bias.view(layer.heads, layer.tokens, 1, -1)
        probabilities = logits.softmax(-1)
        return (probabilities @ value).squeeze(-2).transpose(1, 2).reshape(inputs.query.shape)

    return Attention(call, inputs.leaves)


def prepare_flex(layer: Layer, inputs: Inputs) -> Attention:
    """Compiled FlexAttention with index arithmetic in both mods, as its examples do it."""
    shape, rpb = layer.shape, inputs.rpb
    axes = list(zip(shape, layer.kernel_size, layer.dilation, layer.stride, strict=True))

    def coordinates(index: Tensor) -> list[Tensor]:
        found = []
        for size in reversed(shape):
            found.append(index % size)
            index = index // size
        return found[::-1]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        visible = q >= 0
        for i, j, (size, k, d, s) in zip(coordinates(q), coordinates(kv), axes, strict=True):
            length = (size - i % d + d - 1) // d
            leader = torch.minimum(i // d // s * s + s // 2, length - 1)
            start = torch.minimum((leader - k // 2).clamp(min=0), length - k)
            visible = visible & (i % d == j % d) & (j // d >= start) & (j // d < start + k)
        return visible

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        pairs = zip(coordinates(q), coordinates(kv), axes, strict=True)
        # Pairs outside the window are scored before they are masked, so their indices have to be legal too.
        return score + rpb[(h, *((j // d - i // d + k - 1).clamp(0, 2 * k - 2) for i, j, (_, k, d, _) in pairs))]

    return _compile_flex(layer, inputs, mask_mod, None if rpb is None else score_mod)


def prepare_flex_tuned(layer: Layer, inputs: Inputs) -> Attention:
    """Compiled FlexAttention with tables for what index arithmetic would compute anew for each pair.

    Each axis gets a coordinate in which residue classes lie too far apart to see each other: one comparison then
    decides class and window at once, and differences of coordinates index the bias.
    """
    kernel_size = layer.kernel_size
    flat_rpb: Any = None if inputs.rpb is None else inputs.rpb.flatten(1)
    own, first = _class_coordinates(layer, inputs.query.device)
    last = math.prod(2 * k - 1 for k in kernel_size) - 1

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        visible = q >= 0
        for coordinate, start, k in zip(own, first, kernel_size, strict=True):
            place = coordinate[kv] - start[q]
            visible = visible & (place >= 0) & (place < k)
        return visible

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        pair = q * 0
        for coordinate, k in zip(own, kernel_size, strict=True):
            pair = pair * (2 * k - 1) + coordinate[kv] - coordinate[q] + k - 1
        return score + flat_rpb[h, pair.clamp(0, last)]

    return _compile_flex(layer, inputs, mask_mod, None if flat_rpb is None else score_mod)


def _class_coordinates(layer: Layer, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Per axis, `[tokens]` each: a token's coordinate, and that of the first key it sees."""
    own: list[Tensor] = []
    first: list[Tensor] = []
    for dim, axis in enumerate(layer.geometry.axes):
        start = torch.as_tensor(axis.neighbors()[0][:, 0], device=device)
        to_tokens = [1] * len(layer.shape)
        to_tokens[dim] = axis.size
        for places, found in ((torch.arange(axis.size, device=device), own), (start, first)):
            coordinate = (places % axis.dilation) * (axis.size + axis.kernel) + places // axis.dilation
            found.append(coordinate.view(to_tokens).expand(layer.shape).flatten().int())
    return own, first


def _compile_flex(layer: Layer, inputs: Inputs, mask_mod: Callable[..., Tensor], score_mod: Any) -> Attention:
    """Compiled here, at the first call."""
    mask = _block_mask(layer, inputs.query.device, mask_mod)
    # A fresh cache for each layer: dynamo gives up on a function that it had to compile too often.
    torch.compiler.reset()
    # Without fullgraph, anything that dynamo cannot follow in a mod would quietly run uncompiled.
    attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def call() -> Tensor:
        query, key, value = (x.flatten(1, -3).transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
        out = attend(query, key, value, score_mod=score_mod, block_mask=mask)
        return out.transpose(1, 2).view_as(inputs.query)

    # A backward that is run again and again, to be timed, must leave the tensors saved for it as they are.
    with functorch_config.patch(donated_buffer=False):
        call()
    return Attention(call, inputs.leaves)


def _block_mask(layer: Layer, device: torch.device, mask_mod: Callable[..., Tensor], block: int = 128) -> BlockMask:
    """Result of `create_block_mask`, without evaluating every pair of tokens on the way."""
    keys, _ = neighbors(layer, device)
    blocks = math.ceil(layer.tokens / block)
    queries = torch.arange(layer.tokens, device=device)[:, None]
    visible = torch.bincount((queries // block * blocks + keys // block).flatten(), minlength=blocks**2)
    full = (visible == block**2).view(blocks, blocks)
    partial = (visible > 0).view(blocks, blocks) & ~full

    def listed(choice: Tensor) -> tuple[Tensor, Tensor]:
        order = choice.int().argsort(dim=1, descending=True, stable=True).int()
        return choice.sum(1, dtype=torch.int32)[None, None], order[None, None]

    sizes = (layer.tokens, layer.geometry.num_tokens)
    return BlockMask.from_kv_blocks(
        *listed(partial), *listed(full), BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=sizes
    )


def prepare_sdpa(layer: Layer, inputs: Inputs) -> Attention:
    """Full attention under a bias that is written out for every pair of tokens, -inf outside the window."""
    keys, pairs = neighbors(layer, inputs.query.device)
    heads, tokens = layer.heads, layer.tokens
    keys, pairs = keys.expand(heads, -1, -1), pairs.flatten()

    def call() -> Tensor:
        query, key, value = (x.flatten(1, -3).transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
        near = query.new_zeros(keys.shape)
        if inputs.rpb is not None:
            near = inputs.rpb.flatten(1).index_select(1, pairs).view(keys.shape)
        bias = near.new_full((heads, tokens, tokens), -torch.inf).scatter(2, keys, near)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return out.transpose(1, 2).view_as(inputs.query)

    return Attention(call, inputs.leaves)


MOST_ROOM = 1 << 30


def sdpa_obstacle(layer: Layer, inputs: Inputs) -> str | None:
    needed = layer.heads * layer.tokens**2 * inputs.query.element_size()
    return f"its matrix of all pairs would take {needed / 2**30:.0f} GiB" if needed > MOST_ROOM else None


def natten_obstacle(layer: Layer, inputs: Inputs) -> str | None:
    return sdpa_obstacle(layer, inputs) if inputs.query.device.type == "cpu" else None


def gather_obstacle(layer: Layer, inputs: Inputs) -> str | None:
    needed = 2 * inputs.query.nbytes * math.prod(layer.kernel_size)
    return f"its keys and values would take {needed / 2**30:.0f} GiB" if needed > MOST_ROOM else None


def flex_obstacle(layer: Layer, inputs: Inputs) -> str | None:
    if inputs.query.device.type == "cpu" and inputs.query.requires_grad:
        return "FlexAttention has no backward on the CPU"
    return None


def prepare_natten(layer: Layer, inputs: Inputs, backend: str | None = None) -> Attention:
    """NATTEN as its users call it, without a bias: it has none. Unless one is named it chooses its backend."""
    function = getattr(importlib.import_module("natten"), f"na{len(layer.shape)}d")
    options = {"kernel_size": layer.kernel_size, "dilation": layer.dilation, "stride": layer.stride, "backend": backend}

    def call() -> Tensor:
        return function(inputs.query, inputs.key, inputs.value, **options)

    return Attention(call, inputs.leaves[:3])


SWIN_WINDOW = 7


def prepare_swin(layer: Layer, inputs: Inputs) -> Attention:
    """timm's WindowAttention of Swin without its projections, as timm runs it: with its bias, on windows of 7x7.

    It is another function: each query attends to the 49 keys of its own window, and windows do not overlap. Keys per
    query, heads, channels and bias are the same, so on a map of one window it is the same function as ours. The tokens
    come packed and in windows, and stay there: what Swin spends on partitioning the map is left out.
    """
    from timm.models.swin_transformer import WindowAttention

    attention: Any = WindowAttention(layer.heads * layer.dim, layer.heads, window_size=SWIN_WINDOW)
    attention.qkv = attention.proj = nn.Identity()
    with torch.no_grad():
        windows = torch.stack([inputs.query, inputs.key, inputs.value], dim=-3).flatten(-3)
        windows = windows.view(-1, SWIN_WINDOW**2, windows.shape[-1])
        # Swin counts offsets from key to query, and keeps heads last.
        table = inputs.rpb.flip(1, 2).flatten(1).T.contiguous()
    leaves = tuple(x.requires_grad_(inputs.query.requires_grad) for x in (windows, table))
    del attention.relative_position_bias_table
    attention.to(inputs.query.device).relative_position_bias_table = table
    return Attention(lambda: attention(windows).view_as(inputs.query), leaves)


def swin_obstacle(layer: Layer, inputs: Inputs) -> str | None:
    shape = layer.shape
    if not layer.has_bias:
        return "it always has a bias"
    if len(shape) != 2 or any(size % SWIN_WINDOW for size in shape):
        return f"its windows of {SWIN_WINDOW}x{SWIN_WINDOW} do not tile this map"
    return None


PEERS = {
    peer.name: peer
    for peer in (
        Peer("flex", prepare_flex, flex_obstacle),
        Peer("flex-tuned", prepare_flex_tuned, flex_obstacle),
        Peer("natten", prepare_natten, natten_obstacle, has_bias=False),
        Peer("natten-cutlass-fna", partial(prepare_natten, backend="cutlass-fna"), has_bias=False),
        Peer("natten-hopper-fna", partial(prepare_natten, backend="hopper-fna"), has_bias=False),
        Peer("sdpa", prepare_sdpa, sdpa_obstacle),
        Peer("gather", prepare_gather, gather_obstacle),
        Peer("gather-tuned", prepare_gather_tuned, gather_obstacle),
        Peer("swin", prepare_swin, swin_obstacle, same_function=False),
    )
}
