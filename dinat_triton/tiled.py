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
    table = bias.table(rpb, problem.layout.rel, problem.dtype)
    for group in problem.groups():
        if need_lse or dropout_p > 0:
            logits = problem.logits(group, table)
            if need_lse:
                problem.scatter(logits.logsumexp(-1, keepdim=True), group.rows, lse)
            p = problem.drop(logits.softmax(-1), group)
            tile = p @ problem.gather(v, group.columns).to(p.dtype)
        else:
            qt, kt, vt = (problem.gather(x, t) for x, t in ((q, group.rows), (k, group.columns), (v, group.columns)))
            tile = scaled_dot_product_attention(qt, kt, vt, attn_mask=problem.mask(group, table), scale=scale)
        problem.scatter(tile, group.rows, out)
    return out.unflatten(1, geometry.shape), lse.squeeze(-1).unflatten(1, geometry.shape) if need_lse else lse


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
    k, v = problem.k, problem.v
    grad_q = grads[0].flatten(1, -3)
    grad_k, grad_v = (torch.zeros_like(x, dtype=problem.dtype) for x in (k, v))
    table = bias.table(rpb, problem.layout.rel, problem.dtype)
    grad_table = torch.zeros_like(table)
    for group in problem.groups():
        qt, do = (problem.gather(x, group.rows).to(problem.dtype) for x in (problem.q, grad_out.flatten(1, -3)))
        kt, vt = (problem.gather(x, group.columns).to(problem.dtype) for x in (k, v))
        p = problem.logits(group, table).softmax(-1)
        problem.scatter_add(problem.drop(p, group).mT @ do, group.columns, grad_v)
        dp = problem.drop(do @ vt.mT, group)
        ds = dp.sub_((p * dp).sum(-1, keepdim=True))
        if grad_lse is not None:
            ds += problem.gather(grad_lse.flatten(1, -2).unsqueeze(-1), group.rows)
        ds *= p
        problem.scatter((ds @ kt).mul_(scale), group.rows, grad_q)
        problem.scatter_add((ds.mT @ qt).mul_(scale), group.columns, grad_k)
        if rpb is not None:
            grad_table[:, group.pairs] += ds.sum(0).flatten().view(len(rpb), -1)
    for grad, total in zip(grads[1:], (grad_k, grad_v), strict=True):
        grad.copy_(total.unflatten(1, geometry.shape))
    return None if rpb is None else bias.table_grad(grad_table, problem.layout.rel, geometry.bias_shape).to(rpb.dtype)


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
        self.q, self.k, self.v = (x.flatten(1, -3) for x in (query, key, value))  # [batch, tokens, heads, dim]
        self.scale, self.dropout_p, self.seed = scale, dropout_p, seed
        self.batch, _, self.heads, _ = self.q.shape
        self.kv_heads = self.k.shape[2]
        self.dtype = torch.promote_types(self.q.dtype, torch.float32)
        tile = choose_tile(geometry, self.batch * self.heads)
        self.layout = layout_of(geometry, tile, self.q.device)

    def groups(self) -> Iterator[Group]:
        return self.layout.groups(self.batch * self.heads)

    def gather(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Tiles `[batch * tiles, key heads, group * cells, dim]` of `[batch, tokens, heads, dim]`."""
        tiles = x.index_select(1, tokens.flatten())
        folded = tiles.view(-1, tokens.shape[1], self.kv_heads, x.shape[2] // self.kv_heads, x.shape[3])
        return folded.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def _unfold(self, tile: Tensor, tokens: Tensor) -> Tensor:
        """The inverse of `gather`: `[batch, tiles * cells, heads, dim]`."""
        folded = tile.unflatten(2, (-1, tokens.shape[1])).permute(0, 3, 1, 2, 4)
        return folded.reshape(self.batch, tokens.numel(), -1, tile.shape[-1])

    def scatter(self, tile: Tensor, tokens: Tensor, out: Tensor) -> None:
        """Writes tiles to their tokens; every token is a row of exactly one tile."""
        out.index_copy_(1, tokens.flatten(), self._unfold(tile, tokens).to(out.dtype))

    def scatter_add(self, tile: Tensor, tokens: Tensor, out: Tensor) -> None:
        """Adds tiles to their tokens; a token can be a column of several tiles."""
        out.index_add_(1, tokens.flatten(), self._unfold(tile, tokens))

    def mask(self, group: Group, table: Tensor) -> Tensor:
        """The group's part of the table, `[key heads or 1, group * rows, columns]`."""
        shared = self.heads // self.kv_heads
        part = table[:, group.pairs].unflatten(1, (group.rows.shape[1], group.columns.shape[1]))
        if len(part) == 1:
            return part.repeat(1, shared, 1)
        return part.unflatten(0, (self.kv_heads, shared)).flatten(1, 2)

    def logits(self, group: Group, table: Tensor) -> Tensor:
        q, k = self.gather(self.q, group.rows).to(self.dtype), self.gather(self.k, group.columns).to(self.dtype)
        return ((q @ k.mT).mul_(self.scale)).add_(self.mask(group, table))

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
    pairs: slice  # the class's part of `Layout.rel`


@dataclass(frozen=True)
class Layout:
    """A plan's index tensors on a device."""

    classes: tuple[Group, ...]
    rel: Tensor  # [pairs] bias indices of all classes, one after the other

    def groups(self, scores_per_pair: int) -> Iterator[Group]:
        """Splits every class into groups whose scores stay within SCORES_AT_ONCE."""
        for c in self.classes:
            step = max(1, SCORES_AT_ONCE // (scores_per_pair * c.rows.shape[1] * c.columns.shape[1]))
            for rows, columns in zip(c.rows.split(step), c.columns.split(step), strict=True):
                yield Group(rows, columns, c.pairs)


@lru_cache(maxsize=128)
def layout_of(geometry: Geometry, tile: tuple[int, ...], device: torch.device) -> Layout:
    classes, pairs, start = [], [], 0
    for c in Plan(geometry, tile).classes:
        rows, columns = (torch.as_tensor(tokens, device=device) for tokens in (c.row_tokens, c.col_tokens))
        classes.append(Group(rows, columns, slice(start, start + c.rel.size)))
        pairs.append(torch.as_tensor(c.rel, device=device).flatten())
        start += c.rel.size
    return Layout(tuple(classes), torch.cat(pairs))


@lru_cache(maxsize=512)
def choose_tile(geometry: Geometry, batch_heads: int) -> tuple[int, ...]:
    """The tile with the least modelled time: large tiles evaluate more scores, small ones gather more keys."""

    def cost(tile: tuple[int, ...]) -> float:
        c = Plan(geometry, tile).cost()
        tokens = 2 * (c.queries + c.col_loads)
        return batch_heads * (c.scores * SCORE_NS + tokens * TOKEN_NS) + c.launches * CLASS_NS

    return min(tile_candidates(geometry, MOST_ROWS), key=cost)
