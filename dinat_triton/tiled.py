"""Neighborhood attention on a plan, in pure torch: dense attention of every tile, one batched call per tile class.

Runs wherever torch does. Memory is linear in tokens: tiles are gathered, attended and scattered a few at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dinat_triton import bias
from dinat_triton.dropout import keep_mask
from dinat_triton.geometry import Geometry
from dinat_triton.plan import Plan, tile_candidates

# What a tile choice costs on a CPU core, in nanoseconds: a score, a gathered token and head, and a tile class's calls.
SCORE_NS, TOKEN_NS, CLASS_NS = 1.2, 10.0, 60_000.0
# Scores held at once: a few megabytes, so that a group's products and softmax stay in cache.
SCORES_AT_ONCE = 1 << 20
MOST_ROWS = 1024


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    seed: Tensor | None,
    geometry: Geometry,
    scale: float,
    dropout_p: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Attends; tensors are `[batch, *shape, heads, dim]`. The log-sum-exp is empty unless needed."""
    problem = Problem(query, key, value, seed, geometry, scale, dropout_p)
    q, k, v = problem.q, problem.k, problem.v
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty((*q.shape[:-1], 1) if need_lse else 0, dtype=problem.dtype)
    table = bias.table(rpb, problem.layout.index, geometry, problem.dtype)
    for group in problem.groups():
        qt, kt, vt = problem.gather(q, group.rows), problem.gather(k, group.columns), problem.gather(v, group.columns)
        if need_lse or dropout_p > 0:
            logits = problem.logits(qt, kt, group, table)
            if need_lse:
                problem.put(logits.logsumexp(-1, keepdim=True), group, lse)
            tile = problem.drop(logits.softmax(-1), group) @ vt.to(problem.dtype)
        else:
            tile = scaled_dot_product_attention(qt, kt, vt, attn_mask=problem.mask(group, table), scale=scale)
        problem.put(tile, group, out)
    out = problem.in_order(out).unflatten(1, geometry.shape)
    return out, problem.in_order(lse).squeeze(-1).unflatten(1, geometry.shape) if need_lse else lse


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
    problem = Problem(query, key, value, seed, geometry, scale, dropout_p)
    q, k, v, grad_out = problem.q, problem.k, problem.v, problem.tokens(grad_out)
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.zeros_like(x, dtype=problem.dtype) for x in (k, v))
    table = bias.table(rpb, problem.layout.index, geometry, problem.dtype)
    grad_table = torch.zeros_like(table)
    for group in problem.groups():
        # Contiguous, because each goes into two products, and each product would copy it.
        qt, do = (problem.gather(x, group.rows).to(problem.dtype).contiguous() for x in (q, grad_out))
        kt, vt = (problem.gather(x, group.columns).to(problem.dtype).contiguous() for x in (k, v))
        p = problem.logits(qt, kt, group, table).softmax(-1)
        problem.add(problem.drop(p, group).mT @ do, group, grad_v)
        dp = problem.drop(do @ vt.mT, group)
        ds = dp.sub_((p * dp).sum(-1, keepdim=True))
        if grad_lse is not None:
            ds += problem.gather(grad_lse.flatten(1, -2).unsqueeze(-1), group.rows)
        ds *= p
        problem.put((ds @ kt).mul_(scale), group, grad_q)
        problem.add((ds.mT @ qt).mul_(scale), group, grad_k)
        if rpb is not None:
            grad_table[:, group.pairs] += ds.sum(0).flatten().view(len(rpb), -1)
    for grad, total in zip(grads, (problem.in_order(grad_q), grad_k, grad_v), strict=True):
        grad.copy_(total.unflatten(1, geometry.shape))
    return None if rpb is None else bias.table_grad(grad_table, problem.layout.index, geometry).to(rpb.dtype)


class Problem:
    """The tensors of one call, and how tiles are taken out of them and put back.

    A tile is `[batch * tiles, key heads, group * rows, dim]`: query heads that share a key head are folded into the
    rows, so grouped-query attention needs no copies of keys and values.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seed: Tensor | None,
        geometry: Geometry,
        scale: float,
        dropout_p: float,
    ):
        self.scale, self.dropout_p, self.seed = scale, dropout_p, seed
        self.batch, self.heads, self.kv_heads = query.shape[0], query.shape[-2], key.shape[-2]
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        tile = choose_tile(geometry, self.batch * self.heads)
        self.layout = layout_of(geometry, tile, query.device)
        self.q, self.k, self.v = (self.tokens(x) for x in (query, key, value))

    def groups(self) -> Iterator[Group]:
        return self.layout.groups(self.batch * self.heads)

    def tokens(self, x: Tensor) -> Tensor:
        """`[batch, tokens, heads, dim]`, contiguous to gather from: torch copies a strided tensor whole each time."""
        x = x.flatten(1, -3)
        return x if self.layout.is_whole else x.contiguous()

    def gather(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Tiles `[batch * tiles, key heads, group * cells, dim]` of `[batch, tokens, heads, dim]`."""
        if not self.layout.is_whole:
            x = x.index_select(1, tokens.flatten())
        folded = x.reshape(-1, tokens.shape[1], self.kv_heads, x.shape[2] // self.kv_heads, x.shape[3])
        return folded.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def _unfold(self, tile: Tensor, cells: int) -> Tensor:
        """The inverse of `gather`'s folding: `[batch, tiles * cells, heads, dim]`."""
        folded = tile.unflatten(2, (-1, cells)).permute(0, 3, 1, 2, 4)
        return folded.reshape(self.batch, -1, folded.shape[2] * folded.shape[3], tile.shape[-1])

    def put(self, tile: Tensor, group: Group, out: Tensor) -> None:
        """Writes row tiles to `out`, in the order of the plan."""
        rows = group.rows.numel()
        out[:, group.first : group.first + rows] = self._unfold(tile, group.rows.shape[1])

    def in_order(self, out: Tensor) -> Tensor:
        """Rows in the order of the plan brought into that of the tokens."""
        return out if self.layout.is_whole else out.index_select(1, self.layout.order)

    def add(self, tile: Tensor, group: Group, out: Tensor) -> None:
        """Adds column tiles to their tokens; a token can be a column of several tiles."""
        columns = self._unfold(tile, group.columns.shape[1])
        if self.layout.is_whole:
            out += columns
        else:
            out.index_add_(1, group.columns.flatten(), columns)

    def mask(self, group: Group, table: Tensor) -> Tensor:
        """The group's part of the table, `[1, key heads or 1, group * rows, columns]`: SDPA's fast path wants 4-D."""
        shared = self.heads // self.kv_heads
        part = table[:, group.pairs].unflatten(1, (group.rows.shape[1], group.columns.shape[1]))
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


@dataclass(frozen=True)
class Group:
    """Some tiles of one class, on the device."""

    rows: Tensor  # [tiles, R] tokens
    columns: Tensor  # [tiles, S] tokens
    first: int  # the place of its first row among the rows of all tiles
    pairs: slice  # the class's part of `Layout.index`


@dataclass(frozen=True)
class Layout:
    """A plan's index tensors on a device."""

    classes: tuple[Group, ...]
    index: Tensor  # [pairs] bias indices of all classes, one after the other
    order: Tensor  # [tokens] the place of each token among the rows of all tiles
    is_whole: bool  # one tile holds all tokens in their order: nothing to gather

    def groups(self, scores_per_pair: int) -> Iterator[Group]:
        """Splits every class into groups whose scores stay within SCORES_AT_ONCE."""
        for c in self.classes:
            tiles, rows = c.rows.shape
            step = max(1, SCORES_AT_ONCE // (scores_per_pair * rows * c.columns.shape[1]))
            for tile in range(0, tiles, step):
                part = slice(tile, tile + step)
                yield Group(c.rows[part], c.columns[part], c.first + tile * rows, c.pairs)


@lru_cache(maxsize=128)
def layout_of(geometry: Geometry, tile: tuple[int, ...], device: torch.device) -> Layout:
    classes, first_row, first_pair = [], 0, 0
    plan = Plan(geometry, tile).classes
    for c in plan:
        rows, columns = (torch.as_tensor(tokens, device=device) for tokens in (c.row_tokens, c.col_tokens))
        classes.append(Group(rows, columns, first_row, slice(first_pair, first_pair + c.rel.size)))
        first_row, first_pair = first_row + rows.numel(), first_pair + c.rel.size
    index = bias.pair_index(torch.cat([torch.as_tensor(c.rel, device=device).flatten() for c in plan]), geometry)
    rows = torch.cat([c.rows.flatten() for c in classes])
    is_whole = len(rows) == plan[0].row_tokens.shape[1] and bool((rows.diff() == 1).all())
    return Layout(tuple(classes), index, rows.argsort(), is_whole)


@lru_cache(maxsize=512)
def choose_tile(geometry: Geometry, batch_heads: int) -> tuple[int, ...]:
    """The tile with the least modelled time: large tiles evaluate more scores, small ones gather more keys."""

    def cost(tile: tuple[int, ...]) -> float:
        c = Plan(geometry, tile).cost()
        tokens = 2 * (c.queries + c.col_loads)
        return batch_heads * (c.scores * SCORE_NS + tokens * TOKEN_NS) + c.launches * CLASS_NS

    return min(tile_candidates(geometry, MOST_ROWS), key=cost)
