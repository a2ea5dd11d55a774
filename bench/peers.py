"""The problems of the benchmarks, and what others offer for them. Nothing here imports dinat_triton."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Problem:
    """One layer. `weight` is how often the model has it."""

    name: str
    shape: tuple[int, ...]
    heads: int
    dim: int
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    batch: int = 1
    weight: int = 1

    @property
    def tokens(self) -> int:
        return math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Inputs:
    """Tensors of a problem, heads last; those that have gradients are `leaves`."""

    query: Tensor
    key: Tensor
    value: Tensor
    rpb: Tensor
    grad_out: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.rpb

    @classmethod
    def of(
        cls,
        problem: Problem,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        *,
        requires_grad: bool = False,
        seed: int = 0,
    ) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, grad: bool = requires_grad) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(grad)

        shape = (problem.batch, *problem.shape, problem.heads, problem.dim)
        bias = normal(problem.heads, *(2 * k - 1 for k in problem.kernel_size))
        return cls(normal(*shape), normal(*shape), normal(*shape), bias, normal(*shape, grad=False))


@dataclass(frozen=True)
class Peer:
    """Somebody else's way to compute a problem.

    `prepare` does once what does not depend on the tensors' values. `obstacle` says why a problem cannot run, or None.
    """

    name: str
    prepare: Callable[[Problem, Inputs], Call]
    obstacle: Callable[[Inputs], str | None] = lambda inputs: None
    has_bias: bool = True


def dinat_mini(resolution: int, batch: int = 1) -> list[Problem]:
    """The distinct attention layers of DiNAT-Mini, named by resolution, map and dilation."""
    dilations = {
        224: ([1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5),
        384: ([1, 13, 1], [1, 6, 1, 6], [1, 3] * 3, [1] * 5),
    }
    if resolution not in dilations:
        raise ValueError(f"resolution must be one of {sorted(dilations)}, got {resolution}")
    layers = []
    for stage, of_layers in enumerate(dilations[resolution]):
        size = resolution // (4 << stage)
        for d in sorted(set(of_layers)):
            name = f"{resolution}/{size}x{size}-d{d}"
            weight = of_layers.count(d)
            layers.append(Problem(name, (size, size), 2 << stage, 32, (7, 7), (d, d), batch, weight))
    return layers


def _axis(size: int, kernel: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of each query's keys on one axis, and their offsets in dilation units; both `[size, kernel]`."""
    position = torch.arange(size, device=device)
    group, query = position % dilation, position // dilation
    length = (size - group + dilation - 1) // dilation
    start = torch.minimum((query - kernel // 2).clamp(min=0), length - kernel)
    members = start[:, None] + torch.arange(kernel, device=device)
    return members * dilation + group[:, None], members - query[:, None]


def neighbors(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor]:
    """Raster indices of each query's keys, and their places in the flattened bias table; `[tokens, keys]`."""
    keys = pairs = torch.zeros(1, 1, dtype=torch.long, device=device)
    for size, kernel, dilation in zip(problem.shape, problem.kernel_size, problem.dilation, strict=True):
        positions, offsets = _axis(size, kernel, dilation, device)
        keys = _outer(keys * size, positions)
        pairs = _outer(pairs * (2 * kernel - 1), offsets + kernel - 1)
    return keys, pairs


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None, :, None] + b[None, :, None, :]).reshape(len(a) * len(b), -1)


def prepare_gather(problem: Problem, inputs: Inputs) -> Call:
    """As one first writes it: copy each query's keys and values by advanced indexing, then two einsums."""
    keys, pairs = neighbors(problem, inputs.query.device)
    scale = problem.dim**-0.5

    def call() -> Tensor:
        query, key, value = (x.flatten(1, -3) for x in (inputs.query, inputs.key, inputs.value))
        logits = scale * torch.einsum("bnhd,bnkhd->bhnk", query, key[:, keys])
        probabilities = (logits + inputs.rpb.flatten(1)[:, pairs]).softmax(-1)
        return torch.einsum("bhnk,bnkhd->bnhd", probabilities, value[:, keys]).view_as(inputs.query)

    return call


def prepare_gather_tuned(problem: Problem, inputs: Inputs) -> Call:
    """The same with the operations that torch runs fastest, above all in the backward: index_select and matmul."""
    keys, pairs = neighbors(problem, inputs.query.device)
    flat_keys, flat_pairs = keys.flatten(), pairs.flatten()
    scale = problem.dim**-0.5

    def call() -> Tensor:
        query, key, value = (x.flatten(1, -3).transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
        near = (problem.batch, problem.heads, *keys.shape, problem.dim)
        key, value = (x.contiguous().index_select(2, flat_keys).view(near) for x in (key, value))
        bias = inputs.rpb.flatten(1).index_select(1, flat_pairs).view(problem.heads, problem.tokens, 1, -1)
        probabilities = ((scale * query.unsqueeze(-2)) @ key.transpose(-1, -2) + bias).softmax(-1)
        return (probabilities @ value).squeeze(-2).transpose(1, 2).reshape(inputs.query.shape)

    return call


def prepare_flex(problem: Problem, inputs: Inputs) -> Call:
    """Compiled FlexAttention with index arithmetic in both mods, as its examples do it."""
    kernel_size, dilation, shape, rpb = problem.kernel_size, problem.dilation, problem.shape, inputs.rpb

    def coordinates(index: Tensor) -> list[Tensor]:
        found = []
        for size in reversed(shape):
            found.append(index % size)
            index = index // size
        return found[::-1]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        visible = q >= 0
        for i, j, size, k, d in zip(coordinates(q), coordinates(kv), shape, kernel_size, dilation, strict=True):
            length = (size - i % d + d - 1) // d
            start = torch.minimum((i // d - k // 2).clamp(min=0), length - k)
            visible = visible & (i % d == j % d) & (j // d >= start) & (j // d < start + k)
        return visible

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        axes = zip(coordinates(q), coordinates(kv), kernel_size, dilation, strict=True)
        # Pairs outside the window are scored before they are masked, so their indices have to be legal too.
        return score + rpb[(h, *((j // d - i // d + k - 1).clamp(0, 2 * k - 2) for i, j, k, d in axes))]

    return _compile_flex(problem, inputs, mask_mod, score_mod)


def prepare_flex_tuned(problem: Problem, inputs: Inputs) -> Call:
    """Compiled FlexAttention with tables for what index arithmetic would compute anew for each pair.

    Each axis gets a coordinate in which residue classes lie too far apart to see each other: one comparison then
    decides class and window at once, and differences of coordinates index the bias.
    """
    kernel_size, flat_rpb = problem.kernel_size, inputs.rpb.flatten(1)
    own, first = _class_coordinates(problem, inputs.query.device)
    last = flat_rpb.shape[1] - 1

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

    return _compile_flex(problem, inputs, mask_mod, score_mod)


def _class_coordinates(problem: Problem, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Per axis, `[tokens]` each: a token's coordinate, and that of the first key it sees."""
    own: list[Tensor] = []
    first: list[Tensor] = []
    for axis, (size, kernel, dilation) in enumerate(
        zip(problem.shape, problem.kernel_size, problem.dilation, strict=True)
    ):
        start = _axis(size, kernel, dilation, device)[0][:, 0]
        apart = size + kernel
        to_tokens = [1] * len(problem.shape)
        to_tokens[axis] = size
        for places, found in ((torch.arange(size, device=device), own), (start, first)):
            coordinate = (places % dilation) * apart + places // dilation
            found.append(coordinate.view(to_tokens).expand(problem.shape).flatten().int())
    return own, first


def _compile_flex(problem: Problem, inputs: Inputs, mask_mod: Callable[..., Tensor], score_mod: Any) -> Call:
    mask = _block_mask(problem, inputs.query.device, mask_mod)
    # A fresh cache for each problem: dynamo gives up on a function that it had to compile too often.
    torch.compiler.reset()
    # Without fullgraph, anything that dynamo cannot follow in a mod would quietly run uncompiled.
    attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def call() -> Tensor:
        query, key, value = (x.flatten(1, -3).transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
        out = attend(query, key, value, score_mod=score_mod, block_mask=mask)
        return out.transpose(1, 2).view_as(inputs.query)

    return call


def _block_mask(problem: Problem, device: torch.device, mask_mod: Callable[..., Tensor], block: int = 128) -> BlockMask:
    """What `create_block_mask` makes, without evaluating every pair of tokens on the way."""
    keys, _ = neighbors(problem, device)
    blocks = math.ceil(problem.tokens / block)
    queries = torch.arange(problem.tokens, device=device)[:, None]
    visible = torch.bincount((queries // block * blocks + keys // block).flatten(), minlength=blocks**2)
    full = (visible == block**2).view(blocks, blocks)
    partial = (visible > 0).view(blocks, blocks) & ~full

    def listed(choice: Tensor) -> tuple[Tensor, Tensor]:
        order = choice.int().argsort(dim=1, descending=True, stable=True).int()
        return choice.sum(1, dtype=torch.int32)[None, None], order[None, None]

    sizes = (problem.tokens, problem.tokens)
    return BlockMask.from_kv_blocks(
        *listed(partial), *listed(full), BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=sizes
    )


def prepare_sdpa(problem: Problem, inputs: Inputs) -> Call:
    """Full attention under a bias that is written out for every pair of tokens, -inf outside the window."""
    keys, pairs = neighbors(problem, inputs.query.device)
    heads, tokens = problem.heads, problem.tokens
    keys, pairs = keys.expand(heads, -1, -1), pairs.flatten()

    def call() -> Tensor:
        query, key, value = (x.flatten(1, -3).transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
        near = inputs.rpb.flatten(1).index_select(1, pairs).view(keys.shape)
        bias = near.new_full((heads, tokens, tokens), -torch.inf).scatter(2, keys, near)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return out.transpose(1, 2).view_as(inputs.query)

    return call


def sdpa_obstacle(inputs: Inputs, most: int = 4 << 30) -> str | None:
    heads, tokens = inputs.query.shape[-2], math.prod(inputs.query.shape[1:-2])
    needed = heads * tokens**2 * inputs.query.element_size()
    return f"its bias would take {needed / 2**30:.0f} GiB" if needed > most else None


def flex_obstacle(inputs: Inputs) -> str | None:
    if inputs.query.device.type == "cpu" and inputs.query.requires_grad:
        return "FlexAttention has no backward on the CPU"
    return None


def prepare_natten(problem: Problem, inputs: Inputs) -> Call:
    """NATTEN as its users call it, without a bias: it has none."""
    function = getattr(importlib.import_module("natten"), f"na{len(problem.shape)}d")

    def call() -> Tensor:
        return function(inputs.query, inputs.key, inputs.value, problem.kernel_size, dilation=problem.dilation)

    return call


def natten_obstacle(inputs: Inputs) -> str | None:
    try:
        importlib.import_module("natten")
    except ImportError as error:
        return f"NATTEN cannot be imported: {error}"
    if inputs.query.device.type == "cpu" and inputs.query.requires_grad:
        return "NATTEN has no backward on the CPU"
    return None


PEERS = (
    Peer("flex", prepare_flex, flex_obstacle),
    Peer("flex-tuned", prepare_flex_tuned, flex_obstacle),
    Peer("natten", prepare_natten, natten_obstacle, has_bias=False),
    Peer("gather", prepare_gather),
    Peer("gather-tuned", prepare_gather_tuned),
)

# Too slow for a CPU.
SDPA = Peer("sdpa", prepare_sdpa, sdpa_obstacle)


def find(names: Sequence[str]) -> list[Peer]:
    known = {peer.name: peer for peer in (*PEERS, SDPA)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown peers {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names]
