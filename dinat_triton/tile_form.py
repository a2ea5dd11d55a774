"""The op on a plan as a graph of a dozen plain torch operations, for exporters and compilers.

What a head has of a token is one vector, and the input is a list of them. One gather of vectors by constant indices
makes all tiles of queries, one those of keys, one those of values; then come a batched product, a softmax and a second
product, and a last gather puts the output in order. Nothing is transposed. Tiles with fewer queries or keys than the
largest are padded, and each takes its bias from the table of its class. Sizes are constants of the graph, but for the
batch, which may be symbolic. Memory is linear in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from dinat_triton.candidates import Candidates
from dinat_triton.geometry import Geometry, IntArray
from dinat_triton.packing import split_mask, unpack
from dinat_triton.plan import Plan

# What a tile choice costs, in no unit: a score, and a token that is gathered.
SCORE, TOKEN = 1, 20
MOST_ROWS = 256


def attention(
    qkv: list[Tensor], rpb: Tensor | None, geometry: Geometry, scale: float, may_hide: bool = True
) -> tuple[Tensor, Tensor]:
    """Attends; tensors are those of `ops.na`. Returns the output and the log-sum-exp of the logits.

    `may_hide` is whether `rpb` may hide every key of a window, which takes an operation more.
    """
    query, key, _ = unpack(qkv)
    qkv, key_mask = split_mask(qkv)
    heads, wide, form = query.shape[-2], torch.promote_types(query.dtype, torch.float32), form_of(geometry)
    own = np.arange(heads)
    shared = own // (heads // key.shape[-2])
    if len(qkv) == 1:
        sources = [(qkv[0], part * heads + own) for part in range(3)]
    else:
        sources = list(zip(qkv, (own, shared, shared), strict=True))
    cells = (form.rows, form.columns, form.columns)
    q, k, v = (form.tiles(x, of_token, tokens) for (x, of_token), tokens in zip(sources, cells, strict=True))
    values = query.new_zeros(1, geometry.num_offsets) if rpb is None else rpb.flatten(1)
    table = _table(values.to(wide), form, heads)
    rpb_alone_hides = rpb is not None and may_hide and key_mask is None
    empty = table.isneginf().all(-1, keepdim=True) if rpb_alone_hides else None
    table = table if empty is None else table.masked_fill(empty, 0)
    logits = ((q * scale) @ k.mT).to(wide) + table
    if key_mask is not None:
        hidden = form.tiles((~key_mask).to(wide)[..., None, None], 0 * own, form.columns).mT > 0
        logits = logits.masked_fill(hidden, -torch.inf)
        empty = logits.isneginf().all(-1, keepdim=True)
        logits = logits.masked_fill(empty, 0)
    out = logits.softmax(-1).to(v.dtype) @ v
    lse = logits.logsumexp(-1, keepdim=True)
    if empty is not None:
        out, lse = out.masked_fill(empty, 0), lse.masked_fill(empty, -torch.inf)
    out, lse = (form.in_order(x, heads).view(-1, *geometry.shape, heads, x.shape[-1]) for x in (out, lse))
    return out, lse.squeeze(-1)


@dataclass(frozen=True, eq=False)
class Form:
    """A plan written out, with all tiles alike in size.

    Tiles are further heads of one batched product, each with the table of its class. Where there is one class, whose
    table serves all of them, they are further maps.

    Attributes:
        rows, columns: `[tiles, rows]` and `[tiles, columns]`: tokens; padding repeats a tile's first.
        order: `[tokens]`: the place of each token among the rows of all tiles.
        pair_index: `[classes, rows, columns]`: bias indices; padding columns are masked, padding rows repeat the last.
        class_of: `[tiles]`.
    """

    rows: IntArray
    columns: IntArray
    order: IntArray
    pair_index: IntArray
    class_of: IntArray

    def tiles(self, x: Tensor, heads: IntArray, tokens: IntArray) -> Tensor:
        """Tiles of some heads of `x`, `[batch, tiles * heads, cells, dim]` or `[batch * tiles, heads, cells, dim]`."""
        vectors_of_token = prod(x.shape[1:-1]) // len(self.order)
        vectors = tokens[:, None] * vectors_of_token + heads[:, None]  # [tiles, heads, cells]
        maps = len(heads) if len(self.pair_index) == 1 else len(tokens) * len(heads)
        return take(x.contiguous(), vectors).view(-1, maps, tokens.shape[1], x.shape[-1])

    def in_order(self, x: Tensor, heads: int) -> Tensor:
        """Puts rows of such tiles in the order of tokens: `[batch, tokens * heads, dim]`."""
        tile, row = np.divmod(self.order, self.rows.shape[1])
        vectors = (tile[:, None] * heads + np.arange(heads)) * self.rows.shape[1] + row[:, None]
        return take(x.view(-1, self.rows.size * heads, x.shape[-1]), vectors)


@lru_cache(maxsize=64)
def form_of(geometry: Geometry) -> Form:
    plan = Plan(geometry, choose_tile(geometry))
    (most_rows, most_columns), masked = plan.largest, geometry.num_offsets
    rows, columns, is_row, pairs = [], [], [], []
    for tiles in plan.classes:
        own_rows, own_columns = (
            base[:, None] + np.pad(offsets, (0, most - len(offsets)))
            for base, offsets, most in (
                (tiles.row_base, tiles.rows, most_rows), (tiles.col_base, tiles.columns, most_columns)
            )
        )  # fmt: skip
        rows.append(own_rows)
        columns.append(own_columns)
        is_row.append(np.broadcast_to(np.arange(most_rows) < len(tiles.rows), own_rows.shape).ravel())
        rel = tiles.rel()
        more_rows, more_columns = (most - n for most, n in zip(plan.largest, rel.shape, strict=True))
        rel = np.pad(np.where(rel < 0, masked, rel), ((0, 0), (0, more_columns)), constant_values=masked)
        pairs.append(np.pad(rel, ((0, more_rows), (0, 0)), mode="edge"))
    slots = np.flatnonzero(np.concatenate(is_row))
    order = slots[np.argsort(np.concatenate(rows).ravel()[slots])]
    class_of = np.repeat(np.arange(len(pairs)), plan.shapes[:, 0])
    return Form(np.concatenate(rows), np.concatenate(columns), order, np.stack(pairs), class_of)


def choose_tile(geometry: Geometry) -> tuple[int, ...]:
    """The tile with the least work: large ones evaluate more scores, small ones gather more keys."""
    found = Candidates(geometry, MOST_ROWS)
    work = found.num_tiles * (SCORE * found.rows * found.columns + TOKEN * (found.rows + found.columns))
    return tuple(found.tiles[np.argmin(work)].tolist())


def take(x: Tensor, vectors: IntArray) -> Tensor:
    """Vectors of `x`, which is contiguous: `[batch, vectors, dim]`."""
    x = x.view(-1, prod(x.shape[1:-1]), x.shape[-1])
    return x.index_select(1, torch.as_tensor(vectors.ravel(), device=x.device))


def _table(bias: Tensor, form: Form, heads: int) -> Tensor:
    """Bias of a form's pairs, -inf where masked, `[1, heads or tiles * heads, rows, columns]`."""
    values = torch.nn.functional.pad(bias, (0, 1), value=-torch.inf)  # the masked pairs' is behind the last
    index = torch.as_tensor(form.pair_index.ravel(), device=bias.device)
    table = values.index_select(1, index).unflatten(1, form.pair_index.shape).transpose(0, 1)
    if len(form.pair_index) > 1:
        class_of = torch.as_tensor(form.class_of, device=bias.device)
        table = table.index_select(0, class_of).expand(-1, heads, -1, -1)
    return table.flatten(0, 1)[None]
