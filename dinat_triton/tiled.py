"""Neighborhood attention on a plan, in pure torch: dense attention of every tile, one batched call per tile class.

Runs wherever torch does. Memory is linear in tokens: tiles are gathered, attended and scattered a few at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dinat_triton import bias, store
from dinat_triton.dropout import keep_mask
from dinat_triton.geometry import Geometry
from dinat_triton.packing import unpack
from dinat_triton.plan import Plan, tile_candidates

# What a tile choice costs on two CPU cores, in nanoseconds: a score, a token of one head that is gathered, an entry of
# the bias table, and the calls for a tile class.
SCORE_NS, TOKEN_NS, ENTRY_NS, CLASS_NS = 0.7, 15.0, 0.4, 40_000.0
# Scores held at once: a few megabytes, so that a group's products and softmax stay in cache.
SCORES_AT_ONCE = 1 << 20
MOST_ROWS = 1024
# What decides how fast a tile is.
SOURCES = ("tiled.py", "plan.py", "bias.py")


def forward(
    qkv: list[Tensor],
    rpb: Tensor | None,
    seed: Tensor | None,
    geometry: Geometry,
    scale: float,
    dropout_p: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Attends; query, key and value are `[batch, *shape, heads, dim]`. The log-sum-exp is empty unless needed."""
    problem = Problem(qkv, seed, geometry, scale, dropout_p)
    table = bias.table(rpb, problem.layout.index, geometry, problem.dtype)
    if need_lse or dropout_p > 0:
        outs, lses = zip(*(attend_with_lse(problem, group, table) for group in problem.groups), strict=True)
        lse = problem.in_order(lses).squeeze(-1) if need_lse else table.new_empty(0)
        return problem.in_order(outs), lse
    return problem.in_order([attend(problem, group, table) for group in problem.groups]), table.new_empty(0)


def attend(problem: Problem, group: Group, table: Tensor) -> Tensor:
    """Output of a group's rows, `[batch, rows, heads, dim]`."""
    # Tiles have no names here, so that what comes next takes their memory while the cache still holds it.
    return problem.unfold(
        scaled_dot_product_attention(*problem.tiles(group), attn_mask=problem.mask(group, table), scale=problem.scale),
        group.rows,
    )


def attend_with_lse(problem: Problem, group: Group, table: Tensor) -> tuple[Tensor, Tensor]:
    """The same with its log-sum-exp, `[batch, rows, heads, 1]`, and with dropout."""
    q, k, v = problem.tiles(group)
    logits = problem.logits(q, k, group, table)
    tile = (problem.drop(logits.softmax(-1), group) @ v.to(problem.dtype)).to(q.dtype)
    return problem.unfold(tile, group.rows), problem.unfold(logits.logsumexp(-1, keepdim=True), group.rows)


def backward(
    qkv: list[Tensor],
    rpb: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    geometry: Geometry,
    scale: float,
    dropout_p: float,
    grads: list[Tensor],
) -> Tensor | None:
    """Writes the gradients of query, key and value into `grads` and returns that of `rpb`. Recomputes the softmax."""
    problem = Problem(qkv, seed, geometry, scale, dropout_p)
    grad_out = problem.tokens(grad_out)
    grad_lse = None if grad_lse is None else problem.tokens(grad_lse.unsqueeze(-1))
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=problem.dtype).flatten(0, -3) for x in unpack(qkv)[1:])
    grad_q = []
    table = bias.table(rpb, problem.layout.index, geometry, problem.dtype)
    grad_table = torch.zeros_like(table)
    for group in problem.groups:
        # Contiguous, because each goes into two products, and each product would copy it.
        qt, kt, vt = (x.to(problem.dtype).contiguous() for x in problem.tiles(group))
        do = problem.gather(grad_out, group.rows).to(problem.dtype).contiguous()
        p = problem.logits(qt, kt, group, table).softmax(-1)
        problem.add(problem.drop(p, group).mT @ do, group, grad_v)
        dp = problem.drop(do @ vt.mT, group)
        ds = dp.sub_((p * dp).sum(-1, keepdim=True))
        if grad_lse is not None:
            ds += problem.gather(grad_lse, group.rows)
        ds *= p
        grad_q.append(problem.unfold((ds @ kt).mul_(scale), group.rows))
        problem.add((ds.mT @ qt).mul_(scale), group, grad_k)
        if rpb is not None:
            grad_table.narrow(1, *group.pairs).add_(ds.sum(0).flatten().view(len(rpb), -1))
    for grad, total in zip(unpack(grads), (problem.in_order(grad_q), grad_k, grad_v), strict=True):
        grad.copy_(total.view(grad.shape))
    return None if rpb is None else bias.table_grad(grad_table, problem.layout.index, geometry).to(rpb.dtype)


class Problem:
    """The tensors of one call, and how tiles are taken out of them and put back.

    A tile is `[batch * tiles, key heads, group * rows, dim]`: query heads that share a key head are folded into the
    rows, so grouped-query attention needs no copies of keys and values.
    """

    def __init__(self, qkv: list[Tensor], seed: Tensor | None, geometry: Geometry, scale: float, dropout_p: float):
        query, key, value = unpack(qkv)
        self.geometry, self.scale, self.dropout_p, self.seed = geometry, scale, dropout_p, seed
        self.batch, self.heads, self.kv_heads = query.shape[0], query.shape[-2], key.shape[-2]
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        tile = choose_tile(geometry, self.batch, self.heads, query.dtype, query.device.type)
        self.layout = layout_of(geometry, tile, query.device, len(qkv) == 1)
        self.groups = groups_of(self.layout, self.batch * self.heads)
        if self.layout.is_packed:
            # Gathered from where they are: a part of a packed tensor is strided, and torch would copy it whole first.
            self.q = self.k = self.v = self.tokens(qkv[0])
        else:
            self.q, self.k, self.v = self.tokens(query), self.tokens(key), self.tokens(value)

    def tokens(self, x: Tensor) -> Tensor:
        """`[batch * slots, heads, dim]`, contiguous to gather from: from its first axis torch does so on all cores."""
        x = x.reshape(-1, *x.shape[-2:])
        return x if self.layout.is_whole else x.contiguous()

    def tiles(self, group: Group) -> tuple[Tensor, Tensor, Tensor]:
        """The group's queries, keys and values."""
        q, k, v = group.slots
        return self.gather(self.q, q), self.gather(self.k, k), self.gather(self.v, v)

    def of_batch(self, slots: Tensor, per_item: int) -> Tensor:
        """Slots of one batch item as those of all, item after item."""
        if self.batch == 1:
            return slots.view(-1)
        first = torch.arange(0, self.batch * per_item, per_item, device=slots.device)
        return (first[:, None] + slots.view(1, -1)).view(-1)

    def gather(self, x: Tensor, slots: Tensor) -> Tensor:
        """Tiles `[batch * tiles, key heads, group * cells, dim]` of `[batch * slots, heads, dim]`."""
        if not self.layout.is_whole:
            x = x.index_select(0, self.of_batch(slots, len(x) // self.batch))
        tiles = x.view(-1, slots.shape[1], *x.shape[1:])
        if x.shape[1] == self.kv_heads:
            return tiles.transpose(1, 2)
        return tiles.unflatten(2, (self.kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)

    def unfold(self, tile: Tensor, cells: Tensor) -> Tensor:
        """The inverse of `gather`'s folding: `[batch, tiles * cells, heads, dim]`."""
        if tile.shape[2] == cells.shape[1]:
            folded = tile.transpose(1, 2)
        else:
            folded = tile.unflatten(2, (-1, cells.shape[1])).permute(0, 3, 1, 2, 4).flatten(2, 3)
        return folded.reshape(self.batch, -1, *folded.shape[2:])

    def in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows in the order of the plan brought into that of the map, `[batch, *shape, heads, dim]`."""
        x = self.tokens(parts[0] if len(parts) == 1 else torch.cat(tuple(parts), 1))
        if not self.layout.is_whole:
            x = x.index_select(0, self.of_batch(self.layout.order, len(x) // self.batch))
        return x.contiguous().view(self.batch, *self.geometry.shape, *x.shape[1:])

    def add(self, tile: Tensor, group: Group, out: Tensor) -> None:
        """Adds column tiles to their tokens; a token can be a column of several tiles."""
        columns = self.tokens(self.unfold(tile, group.columns))
        if self.layout.is_whole:
            out += columns
        else:
            tokens = self.of_batch(group.columns, len(out) // self.batch)
            out.flatten(1).index_add_(0, tokens, columns.flatten(1))

    def mask(self, group: Group, table: Tensor) -> Tensor:
        """The group's part of the table, `[1, key heads or 1, group * rows, columns]`: SDPA's fast path wants 4-D."""
        shared = self.heads // self.kv_heads
        part = table.narrow(1, *group.pairs).view(len(table), group.rows.shape[1], group.columns.shape[1])
        if shared > 1:
            part = part.repeat(1, shared, 1) if len(part) == 1 else part.reshape(self.kv_heads, -1, part.shape[-1])
        return part.unsqueeze(0)

    def logits(self, q: Tensor, k: Tensor, group: Group, table: Tensor) -> Tensor:
        """Logits of gathered tiles, in the wide dtype."""
        return (q.to(self.dtype) @ k.to(self.dtype).mT).mul_(self.scale).add_(self.mask(group, table))

    def drop(self, x: Tensor, group: Group) -> Tensor:
        """Applies dropout to probabilities, or to their gradient."""
        if self.seed is None:
            return x
        tiles = len(group.rows)
        query = group.rows.view(tiles, 1, 1, -1, 1)
        key = group.columns.view(tiles, 1, 1, 1, -1)
        batch_head = torch.arange(self.batch * self.heads, device=x.device)
        keep = keep_mask(self.seed, self.dropout_p, key, query, batch_head.view(self.batch, 1, self.kv_heads, -1, 1, 1))
        return x * keep.view(x.shape) / (1 - self.dropout_p)


@dataclass(frozen=True, eq=False)
class Group:
    """Some tiles of one class, on the device."""

    rows: Tensor  # [tiles, R] tokens
    columns: Tensor  # [tiles, S] tokens
    slots: tuple[Tensor, Tensor, Tensor]  # where queries, keys and values of these tokens lie in their tensors
    pairs: tuple[int, int]  # the class's part of `Layout.index`: where it begins, and how long it is


@dataclass(frozen=True, eq=False)
class Layout:
    """A plan's index tensors on a device."""

    classes: tuple[Group, ...]
    index: Tensor  # [pairs] bias indices of all classes, one after the other
    order: Tensor  # [tokens] the place of each token among the rows of all tiles
    is_whole: bool  # one tile holds all tokens in their order: nothing to gather
    is_packed: bool  # slots are those of one tensor that packs query, key and value


@lru_cache(maxsize=128)
def groups_of(layout: Layout, maps: int) -> list[Group]:
    """Splits every class into groups whose scores stay within SCORES_AT_ONCE."""
    groups = []
    for c in layout.classes:
        tiles, rows = c.rows.shape
        step = max(1, SCORES_AT_ONCE // (maps * rows * c.columns.shape[1]))
        for tile in range(0, tiles, step):
            part = slice(tile, tile + step)
            query, key, value = (slots[part] for slots in c.slots)
            groups.append(Group(c.rows[part], c.columns[part], (query, key, value), c.pairs))
    return groups


@lru_cache(maxsize=128)
def layout_of(geometry: Geometry, tile: tuple[int, ...], device: torch.device, packed: bool) -> Layout:
    classes, first_pair = [], 0
    plan = Plan(geometry, tile).classes
    places = np.concatenate([c.row_tokens.ravel() for c in plan])
    is_whole = len(places) == plan[0].row_tokens.shape[1] and bool((np.diff(places) == 1).all())
    is_packed = packed and not is_whole
    for c in plan:
        rows, columns = (torch.as_tensor(tokens, device=device) for tokens in (c.row_tokens, c.col_tokens))
        slots = (3 * rows, 3 * columns + 1, 3 * columns + 2) if is_packed else (rows, columns, columns)
        classes.append(Group(rows, columns, slots, (first_pair, c.rel.size)))
        first_pair += c.rel.size
    index = bias.pair_index(torch.cat([torch.as_tensor(c.rel, device=device).flatten() for c in plan]), geometry)
    order = torch.as_tensor(places.argsort(), device=device)
    return Layout(tuple(classes), index, order, is_whole, is_packed)


def choose_tile(
    geometry: Geometry, batch: int, heads: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[int, ...]:
    """The tile that `dinat-triton tune` found for this CPU, or else the one with the least modelled time."""
    return _choose_tile(geometry, batch, heads, dtype, device, torch.get_num_threads())


@lru_cache(maxsize=512)
def _choose_tile(
    geometry: Geometry, batch: int, heads: int, dtype: torch.dtype, device: str, threads: int
) -> tuple[int, ...]:
    entries = load_user_tiles() if device == "cpu" else {}
    found = store.nearest(entries, tile_key(geometry, dtype, threads), batch * heads)
    return modelled_tiles(geometry, batch, heads)[0] if found is None else found


def modelled_tiles(geometry: Geometry, batch: int, heads: int) -> list[tuple[int, ...]]:
    """Tiles by their modelled time, the least first: large ones evaluate more scores, small ones gather more keys."""
    return sorted(tile_candidates(geometry, MOST_ROWS), key=lambda tile: tile_ns(geometry, batch, heads, tile))


def tile_ns(geometry: Geometry, batch: int, heads: int, tile: tuple[int, ...]) -> float:
    """Modelled time of a forward, in nanoseconds."""
    work = tile_work(geometry, batch, heads, tile)
    return sum(n * ns for n, ns in zip(work, (SCORE_NS, TOKEN_NS, ENTRY_NS, CLASS_NS), strict=True))


def tile_work(geometry: Geometry, batch: int, heads: int, tile: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Scores, gathered tokens, entries of the bias table and tile classes of a choice."""
    cost = Plan(geometry, tile).cost()
    # A tile that is the whole map is read where it lies.
    tokens = 0 if prod(tile) == geometry.num_tokens else 2 * (cost.queries + cost.col_loads)
    return batch * heads * cost.scores, batch * heads * tokens, heads * cost.table_entries, cost.launches


def tile_key(geometry: Geometry, dtype: torch.dtype, threads: int) -> str:
    """What a tuned tile holds for, but for the number of maps."""
    return f"{str(dtype).removeprefix('torch.')}/{threads}/{store.geometry_key(geometry)}"


def user_tiles() -> store.Table:
    """Where `dinat-triton tune` keeps the tiles of this CPU."""
    return store.Table("tiles", store.cpu_name(), f"torch {torch.__version__}", SOURCES, tile_of)


def tile_of(entry: Any) -> tuple[int, ...]:
    """A tile out of a table's entry."""
    if not isinstance(entry, list) or not entry or not all(type(n) is int and n >= 1 for n in entry):
        raise ValueError(f"a tile is a list of positive integers, not {entry!r}")
    return tuple(entry)


@lru_cache(maxsize=1)
def load_user_tiles() -> dict[str, tuple[int, ...]]:
    return user_tiles().read()


def forget_tiles() -> None:
    """Reads the table anew when it is next asked for."""
    for cache in (_choose_tile, load_user_tiles):
        cache.cache_clear()
