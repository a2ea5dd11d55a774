"""The op on a plan as a graph of a dozen plain torch operations, for exporters and compilers.

Tokens are gathered into tiles by constant indices; all tiles together are one batched product, their softmax, and a
second product. Tiles with fewer rows or columns than the largest are padded, and each takes its bias from the table of
its class. Sizes are constants of the graph, but for the batch, which may be symbolic. Memory is linear in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dinat_triton.candidates import Candidates
from dinat_triton.geometry import Geometry, IntArray
from dinat_triton.plan import Plan

# What a tile choice costs, in no unit: a score, and a token that is gathered.
SCORE, TOKEN = 1, 20
MOST_ROWS = 256


def attention(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, geometry: Geometry, scale: float
) -> tuple[Tensor, Tensor]:
    """Attends; tensors are `[batch, *shape, heads, dim]`. Returns the output and the log-sum-exp of the logits."""
    wide = torch.promote_types(query.dtype, torch.float32)
    shared = query.shape[-2] // key.shape[-2]
    # Heads before tokens, so that gathered tiles are operands of products as they are.
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (query * scale, key, value))
    if shared > 1:
        k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
    form = form_of(geometry)
    table, empty = _table(rpb, form, geometry, wide)
    q, k, v = take(q, form.rows), take(k, form.columns), take(v, form.columns)  # [batch, heads, tiles, cells, dim]
    logits = (q @ k.mT).to(wide) + table
    out = logits.softmax(-1).to(v.dtype) @ v
    lse = logits.logsumexp(-1, keepdim=True)
    if rpb is not None:  # which may hide every key of a window
        out, lse = out.masked_fill(empty, 0), lse.masked_fill(empty, -torch.inf)
    out, lse = (take(x.flatten(2, 3), form.order[None]).squeeze(2).transpose(1, 2) for x in (out, lse))
    return out.unflatten(1, geometry.shape), lse.squeeze(-1).unflatten(1, geometry.shape)


@dataclass(frozen=True, eq=False)
class Form:
    """A plan written out, with all tiles alike in size.

    Attributes:
        rows, columns: `[tiles, rows]` and `[tiles, columns]`: tokens; padding repeats a tile's first.
        order: `[tokens]`: the place of each token among the rows of all tiles.
        pair_index: `[classes, rows, columns]`: bias indices; padding is masked.
        class_of: `[tiles]`.
    """

    rows: IntArray
    columns: IntArray
    order: IntArray
    pair_index: IntArray
    class_of: IntArray


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
        missing = [(0, most - n) for most, n in zip(plan.largest, rel.shape, strict=True)]
        pairs.append(np.pad(np.where(rel < 0, masked, rel), missing, constant_values=masked))
    slots = np.flatnonzero(np.concatenate(is_row))
    order = slots[np.argsort(np.concatenate(rows).ravel()[slots])]
    class_of = np.repeat(np.arange(len(pairs)), plan.shapes[:, 0])
    return Form(np.concatenate(rows), np.concatenate(columns), order, np.stack(pairs), class_of)


def choose_tile(geometry: Geometry) -> tuple[int, ...]:
    """The tile with the least work: large ones evaluate more scores, small ones gather more keys."""
    found = Candidates(geometry, MOST_ROWS)
    work = found.num_tiles * (SCORE * found.rows * found.columns + TOKEN * (found.rows + found.columns))
    return tuple(found.tiles[np.argmin(work)].tolist())


def take(x: Tensor, tokens: IntArray) -> Tensor:
    """Tiles `[batch, heads, tiles, cells, dim]` out of `[batch, heads, tokens, dim]`."""
    flat = tokens.ravel()
    in_order = len(flat) == x.shape[2] and bool((np.diff(flat) == 1).all())
    gathered = x if in_order else x.index_select(2, torch.as_tensor(flat, device=x.device))
    return gathered.unflatten(2, tokens.shape)


def _table(rpb: Tensor | None, form: Form, geometry: Geometry, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What to add to the logits, `[heads or 1, tiles or 1, rows, columns]`, and which rows see nothing."""
    device, none = (None if rpb is None else rpb.device), torch.zeros(1, geometry.num_offsets, dtype=dtype)
    values = none if rpb is None else rpb.flatten(1).to(dtype)
    values = torch.nn.functional.pad(values, (0, 1), value=-torch.inf)  # the masked pairs' is behind the last
    index = torch.as_tensor(form.pair_index.ravel(), device=device)
    table = values.index_select(1, index).unflatten(1, form.pair_index.shape)
    empty = table.isneginf().all(-1, keepdim=True)
    table = table.masked_fill(empty, 0)
    if len(form.pair_index) > 1:
        class_of = torch.as_tensor(form.class_of, device=device)
        table, empty = table.index_select(1, class_of), empty.index_select(1, class_of)
    return table, empty
