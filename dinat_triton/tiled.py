"""Neighborhood attention on a plan, in pure torch: dense attention of every tile, one batched call per tile class.

Runs wherever torch does. Memory is linear in tokens: tiles are gathered, attended and scattered a few at a time.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dinat_triton import bias, store
from dinat_triton.candidates import Candidates
from dinat_triton.dropout import keep_mask
from dinat_triton.geometry import Geometry
from dinat_triton.packing import split_mask, unpack, unpack_grads
from dinat_triton.plan import Cost, Plan
from dinat_triton.tile_groups import SCORES_AT_ONCE, CutClass, Group, cut_of

# What a tile choice costs on two CPU cores, in nanoseconds: a score, a token of one head that is gathered, an entry of
# the bias table, and the calls for a tile class.
SCORE_NS, TOKEN_NS, ENTRY_NS, CLASS_NS = 0.7, 15.0, 0.4, 40_000.0
MOST_ROWS = 1024
# What decides how fast a tile is.
SOURCES = ("tiled.py", "candidates.py", "axis_cuts.py", "device_tiles.py", "tile_groups.py", "plan.py", "bias.py")


def forward(
    qkv: list[Tensor],
    rpb: Tensor | None,
    seed: Tensor | None,
    geometry: Geometry,
    scale: float,
    dropout_p: float,
    need_lse: bool,
    tile: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attends; query, key and value are `[batch, *shape, heads, dim]`. The log-sum-exp is empty unless needed."""
    call = Call(qkv, rpb, seed, geometry, scale, dropout_p, tile)
    dim, dtype = call.v.shape[-1], call.v.dtype
    outs, lses = Rows(call, dim, dtype), Rows(call, 1, call.dtype)
    for tiles in call.cut.classes():
        table = call.table(tiles)
        for group in tiles.groups():
            if need_lse or dropout_p > 0:
                out, lse = attend_with_lse(call, group, table)
                outs.add(out, group)
                lses.add(lse, group)
            else:
                outs.add(attend_group(call, group, table), group)
    return outs.as_map(), lses.as_map().squeeze(-1) if need_lse else table.new_empty(0)


def attend_group(call: Call, group: Group, table: Tensor) -> Tensor:
    """Output of a group's rows."""
    # No local names: freed tiles are reused while still in cache.
    return scaled_dot_product_attention(*call.tiles(group), attn_mask=call.mask(table, group), scale=call.scale)


def attend_with_lse(call: Call, group: Group, table: Tensor) -> tuple[Tensor, Tensor]:
    """Output of a group's rows and its log-sum-exp, with dropout."""
    q, k, v = call.tiles(group)
    logits = call.logits(q, k, call.mask(table, group))
    tile = (call.drop(call.softmax(logits, -1), group) @ v.to(call.dtype)).to(q.dtype)
    return tile, logits.logsumexp(-1, keepdim=True)


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
    grads: list[Tensor | None],
    wants_bias: bool = True,
    tile: tuple[int, ...] | None = None,
) -> Tensor | None:
    """Writes the gradients of query, key and value into `grads` and returns that of `rpb`. Recomputes the softmax.

    None among `grads` stands for one that is not wanted.
    """
    call = Call(qkv, rpb, seed, geometry, scale, dropout_p, tile)
    grad_out = call.tokens(grad_out)
    grad_lse = None if grad_lse is None else call.tokens(grad_lse.unsqueeze(-1))
    into_q, into_k, into_v = unpack_grads(grads)
    grad_q = None if into_q is None else Rows(call, into_q.shape[-1], call.dtype)
    grad_k, grad_v = (
        None if into is None else into.new_zeros(into.shape, dtype=call.dtype).flatten(0, -3)
        for into in (into_k, into_v)
    )
    grad_rpb = torch.zeros_like(rpb, dtype=call.dtype).flatten(1) if rpb is not None and wants_bias else None
    for tiles in call.cut.classes():
        table = call.table(tiles)
        grad_table = None if grad_rpb is None else torch.zeros_like(table)
        for group in tiles.groups():
            # Contiguous, because each goes into two products, and each product would copy it.
            qt, kt, vt = (x.to(call.dtype).contiguous() for x in call.tiles(group))
            do = call.take_rows(grad_out, group).to(call.dtype).contiguous()
            p = call.softmax(call.logits(qt, kt, call.mask(table, group)), -1)
            if grad_v is not None:
                call.add(call.drop(p, group).mT @ do, group, grad_v)
            if grad_q is None and grad_k is None and grad_table is None:
                continue
            dp = call.drop(do @ vt.mT, group)
            ds = dp.sub_((p * dp).sum(-1, keepdim=True))
            if grad_lse is not None:
                ds += call.take_rows(grad_lse, group)
            ds *= p
            if grad_q is not None:
                grad_q.add((ds @ kt).mul_(scale), group)
            if grad_k is not None:
                call.add((ds.mT @ qt).mul_(scale), group, grad_k)
            if grad_table is not None:
                grad_table += ds.sum(0).view_as(grad_table)
        if grad_rpb is not None and grad_table is not None:
            grad_rpb += bias.table_grad(grad_table.flatten(1), tiles.pair_indices(), geometry.num_offsets)
    totals = (None if grad_q is None else grad_q.as_map(), grad_k, grad_v)
    for into, total in zip((into_q, into_k, into_v), totals, strict=True):
        if into is not None and total is not None:
            into.copy_(total.view(into.shape))
    return None if rpb is None or grad_rpb is None else grad_rpb.to(rpb.dtype).view(rpb.shape)


class Call:
    """The tensors of one call, and how tiles are taken out of them and put back.

    A tile is `[batch * tiles, key heads, group * rows, dim]`: query heads that share a key head are folded into the
    rows, so grouped-query attention needs no copies of keys and values.
    """

    def __init__(
        self,
        qkv: list[Tensor],
        rpb: Tensor | None,
        seed: Tensor | None,
        geometry: Geometry,
        scale: float,
        dropout_p: float,
        tile: tuple[int, ...] | None = None,
    ):
        query, key, value = unpack(qkv)
        qkv, key_mask = split_mask(qkv)
        self.geometry, self.scale, self.dropout_p, self.seed = geometry, scale, dropout_p, seed
        self.batch, self.heads, self.kv_heads = query.shape[0], query.shape[-2], key.shape[-2]
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.rpb = rpb
        # Looking for rows that see nothing costs as much as the softmax. On a GPU, asking would cost more than looking.
        hides = rpb is not None and (rpb.device.type != "cpu" or bool(rpb.isneginf().any()))
        self.softmax = torch._safe_softmax if hides or key_mask is not None else torch.softmax
        tile = tile or choose_tile(geometry, self.batch, self.heads, query.dtype, query.device.type)
        self.cut = cut_of(geometry, tile, query.device, self.batch, self.heads)
        self.is_whole = self.cut.is_whole
        # Gathered from where they are: a part of a packed tensor is strided, and torch would copy it whole first.
        self.is_packed = len(qkv) == 1 and not self.is_whole
        self.key_mask = None if key_mask is None else key_mask.reshape(-1)
        packed = self.tokens(qkv[0]) if self.is_packed else None
        self.q, self.k, self.v = (self.tokens(x) if packed is None else packed for x in (query, key, value))

    def tokens(self, x: Tensor) -> Tensor:
        """`[batch * slots, heads, dim]`, contiguous to gather from: from its first axis torch does so on all cores."""
        x = x.reshape(-1, *x.shape[-2:])
        return x if self.is_whole else x.contiguous()

    def tiles(self, group: Group) -> tuple[Tensor, Tensor, Tensor]:
        """The group's queries, keys and values."""
        rows, columns = len(group.tiles.rows), len(group.tiles.columns)
        q, k, v = group.packed if self.is_packed else (group.rows, group.columns, group.columns)
        return self.take(self.q, q, rows), self.take(self.k, k, columns), self.take(self.v, v, columns)

    def take_rows(self, x: Tensor, group: Group) -> Tensor:
        """Takes the group's rows out of `[batch * tokens, heads, dim]`."""
        return self.take(x, group.rows, len(group.tiles.rows))

    def take(self, x: Tensor, slots: Tensor, cells: int) -> Tensor:
        """Tiles `[batch * tiles, key heads, group * cells, dim]`."""
        tiles = (x if self.is_whole else x.index_select(0, slots)).view(-1, cells, *x.shape[1:])
        if x.shape[1] == self.kv_heads:
            return tiles.transpose(1, 2)
        return tiles.unflatten(2, (self.kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)

    def unfold(self, tile: Tensor, cells: int) -> Tensor:
        """The inverse of `take`'s folding: `[batch * tiles, cells, heads, dim]`."""
        if tile.shape[2] == cells:
            return tile.transpose(1, 2)
        return tile.unflatten(2, (-1, cells)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def add(self, tile: Tensor, group: Group, out: Tensor) -> None:
        """Adds tiles of columns to their tokens; a token can be a column of several tiles."""
        columns = self.unfold(tile, len(group.tiles.columns)).reshape(-1, *out.shape[1:])
        if self.is_whole:
            out += columns
        else:
            out.flatten(1).index_add_(0, group.columns, columns.flatten(1))

    def table(self, tiles: CutClass) -> Tensor:
        """Bias of a class's pairs, -inf where masked, `[heads or 1, rows, columns]`."""
        heads = 1 if self.rpb is None else self.heads
        table = self.q.new_empty((heads, len(tiles.rows), len(tiles.columns)), dtype=self.dtype)
        bias.fill_table(table.flatten(1), self.rpb, tiles.pair_indices(), self.geometry.num_offsets)
        return table

    def mask(self, table: Tensor, group: Group) -> Tensor:
        """Addend to a group's logits, `[1 or batch * tiles, key heads or 1, group * rows, columns]`."""
        table = self.fold(table)
        if self.key_mask is None:
            return table
        shown = self.key_mask if self.is_whole else self.key_mask.index_select(0, group.columns)
        return table.where(shown.view(-1, 1, 1, len(group.tiles.columns)), -torch.inf)

    def fold(self, table: Tensor) -> Tensor:
        """A table as tiles take it, `[1, key heads or 1, group * rows, columns]`: SDPA's fast path wants 4-D."""
        shared = self.heads // self.kv_heads
        if shared > 1:
            one = len(table) == 1
            table = table.repeat(1, shared, 1) if one else table.reshape(self.kv_heads, -1, table.shape[-1])
        return table.unsqueeze(0)

    def logits(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        """Logits of gathered tiles, in the wide dtype."""
        return (q.to(self.dtype) @ k.to(self.dtype).mT).mul_(self.scale).add_(mask)

    def drop(self, x: Tensor, group: Group) -> Tensor:
        """Applies dropout to probabilities, or to their gradient."""
        if self.seed is None:
            return x
        tiles = len(group.row_base)
        query = (group.row_base[:, None] + group.tiles.rows).view(tiles, 1, 1, -1, 1)
        key = (group.col_base[:, None] + group.tiles.columns).view(tiles, 1, 1, 1, -1)
        batch_head = torch.arange(self.batch * self.heads, device=x.device)
        keep = keep_mask(self.seed, self.dropout_p, key, query, batch_head.view(self.batch, 1, self.kv_heads, -1, 1, 1))
        return x * keep.view(x.shape) / (1 - self.dropout_p)


class Rows:
    """Something of every query, collected group by group and put in the order of the map at once."""

    def __init__(self, call: Call, dim: int, dtype: torch.dtype):
        self.call = call
        # In one piece: many that stay, between larger ones that go, would leave the heap in holes.
        tokens = call.batch * call.geometry.num_tokens
        self.rows = call.q.new_empty((tokens, call.heads, dim), dtype=dtype)
        has_order = call.is_whole or call.cut.order is not None
        self.slots = None if has_order else call.q.new_empty(tokens, dtype=torch.int64)
        self.past = 0

    def add(self, tile: Tensor, group: Group) -> None:
        rows = self.call.unfold(tile, len(group.tiles.rows))
        own = slice(self.past, self.past + len(group.rows))
        self.rows[own].view(rows.shape).copy_(rows)
        if self.slots is not None:
            self.slots[own] = group.rows
        self.past = own.stop

    def as_map(self) -> Tensor:
        """`[batch, *shape, heads, dim]`."""
        call, rows = self.call, self.rows
        order = call.cut.order if self.slots is None else call.cut.find_order(self.slots)
        if order is not None:  # or else all lie where they belong
            # Gathering rows is many times quicker than scattering them.
            rows = rows.index_select(0, order)
        return rows.view(call.batch, *call.geometry.shape, *rows.shape[1:])


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
    """Tiles by their modelled time, the least first: large ones evaluate more scores, small ones gather more keys.

    Those of more scores than are to be held at once come last, the smallest of them first.
    """
    candidates = Candidates(geometry, MOST_ROWS)
    scores = heads * candidates.rows * candidates.columns
    work = _work(candidates, candidates.rows == geometry.num_tokens, geometry, batch, heads)
    nanoseconds = sum(n * ns for n, ns in zip(work, (SCORE_NS, TOKEN_NS, ENTRY_NS, CLASS_NS), strict=True))
    too_large = np.where(scores > SCORES_AT_ONCE, scores, 0)
    return [tuple(tile) for tile in candidates.tiles[np.lexsort((nanoseconds, too_large))].tolist()]


def tile_work(geometry: Geometry, batch: int, heads: int, tile: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Scores, gathered tokens, entries of the bias table and tile classes of a choice."""
    return _work(Plan(geometry, tile).cost(), prod(tile) == geometry.num_tokens, geometry, batch, heads)


def _work(counts: Cost | Candidates, is_whole: Any, geometry: Geometry, batch: int, heads: int) -> tuple:
    """`tile_work` of a plan, or of many candidates at once."""
    # A tile that is the whole map is read where it lies.
    tokens = (1 - is_whole * (counts.col_loads == geometry.num_tokens)) * 2 * (geometry.num_tokens + counts.col_loads)
    return batch * heads * counts.scores, batch * heads * tokens, heads * counts.table_entries, counts.launches


def tile_key(geometry: Geometry, dtype: torch.dtype, threads: int) -> str:
    """Key of what a tuned tile holds for, but for the number of maps."""
    return f"{str(dtype).removeprefix('torch.')}/{threads}/{store.geometry_key(geometry)}"


def user_tiles() -> store.Table:
    """The table in which `dinat-triton tune` keeps the tiles of this CPU."""
    return store.Table("tiles", store.cpu_name(), f"torch {torch.__version__}", SOURCES, tile_of)


def tile_of(key: str, entry: Any) -> tuple[int, ...]:
    """A tile out of a table's entry, for the map in its key."""
    shape = store.shape_in(key)
    if not isinstance(entry, list) or len(entry) != len(shape) or not all(type(n) is int for n in entry):
        raise ValueError(f"a tile for {key} is a list of {len(shape)} integers, not {entry!r}")
    if not all(1 <= n <= side for n, side in zip(entry, shape, strict=True)):
        raise ValueError(f"a tile for {key} is at least 1 and fits the map, which {entry!r} does not")
    return tuple(entry)


@lru_cache(maxsize=1)
def load_user_tiles() -> dict[str, tuple[int, ...]]:
    return user_tiles().read()
