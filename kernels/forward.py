"""The fused forward: softmax(scale * q . k + bias) . v, tile by tile of a plan."""

import triton
import triton.language as tl

from dinat_triton.kernels.primitives import (
    LN2,
    LOG2E,
    LOWEST,
    RUNTIME,
    chunk_logits,
    dot,
    drop,
    find_head,
    hide_logits,
    load_tile,
    padded,
    pair_bias,
    read_bases,
    read_columns,
    read_items,
    read_rows,
    read_run,
    sees_pairs,
    shown_tokens,
    store_row,
    store_tile,
)


@triton.jit
def attend(
    s, v_tile, so_far, to_log2, dropout, row_tok, col_tok, batch_head, ONLINE: tl.constexpr, PRECISION: tl.constexpr
):
    """Attends to one chunk of columns; ONLINE adds it to the maximum, sum and output of the chunks before."""
    m, total, acc = so_far
    m_next = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s * to_log2 - (m_next * to_log2)[:, None])
    total_next = tl.sum(p, 1)
    p = drop(p, dropout, row_tok[:, None], col_tok[None, :], batch_head)
    if ONLINE:
        shrink = tl.exp2((m - m_next) * to_log2)
        total_next += total * shrink
        acc = dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], PRECISION)  # [R, DV]
    else:
        acc = dot(p.to(v_tile.dtype), v_tile, None, PRECISION)
    return m_next, total_next, acc


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    q, k, v, out, lse, bias_source, seed, key_mask, layout, codes, strides,
    batch, batch_step, tokens, heads, group, bias_head, max_chunks, scale, keep_from: tl.uint32, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, ONE_CHUNK: tl.constexpr,
    LONG_AXIS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (runs * heads, batch splits): a program walks one run of tiles over its part of the batch.

    One chunk: `bias_source` is rpb, and the tile's bias is gathered once and stays in registers. More: it is the table
    that `table_kernel` wrote, read chunk by chunk out of the cache; without a bias there is none.
    """
    runs, bases, rows, columns = layout
    q_strides, k_strides, v_strides = strides
    head, tile_class, first, end, chunks = read_run(runs, heads)
    first_item, end_item = read_items(batch, batch_step)
    row_off, row_sight = read_rows(rows, tile_class, ROWS, LONG_AXIS)
    if ONE_CHUNK:
        col_off, col_sight = read_columns(columns, tile_class, 0, max_chunks, CHUNK, LONG_AXIS)
        seen = sees_pairs(row_sight, col_sight, LONG_AXIS)
        bias = pair_bias(bias_source, head * bias_head, codes, tile_class, 0, max_chunks, seen, 1 / scale)  # [R, C]
    else:
        class_at = tl.multiple_of(head.to(tl.int64) * bias_head, 16) + tile_class * (ROWS * CHUNK) * max_chunks
    to_log2 = scale * LOG2E
    kv_head = head // group
    dropout = (seed, keep_from, keep_scale)

    for tile in range(first, end):
        row_base, col_base = read_bases(bases, tile)
        row_tok = row_base + row_off
        if ONE_CHUNK:
            col_tok = col_base + col_off
        for item in tl.range(first_item, end_item, disable_licm=True):
            i = tl.cast(item, tl.int64)
            batch_head = item * heads + head
            q_tile = load_tile(find_head(q, q_strides, i, head), row_tok, D)  # [R, D]
            k_place = find_head(k, k_strides, i, kv_head)
            v_place = find_head(v, v_strides, i, kv_head)
            m = tl.full((ROWS,), LOWEST, tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            acc = tl.zeros((ROWS, padded(DV)), tl.float32)
            if ONE_CHUNK:
                key_tok = shown_tokens(key_mask, i, tokens, col_tok)
                k_tile = load_tile(k_place, key_tok, D)  # [C, D]
                # The bias is the accumulator: adding it after the product would compute exponentials in two layouts.
                s = dot(q_tile, tl.trans(k_tile), bias, PRECISION)  # [R, C]
                s = hide_logits(s, key_mask, key_tok[None, :])
                v_tile = load_tile(v_place, key_tok, DV)  # [C, DV]
                m, total, acc = attend(
                    s, v_tile, (m, total, acc), to_log2, dropout, row_tok, col_tok, batch_head, False, PRECISION
                )
            else:
                for chunk in range(chunks):
                    col_off, col_sight = read_columns(columns, tile_class, chunk, max_chunks, CHUNK, LONG_AXIS)
                    col_tok = col_base + col_off
                    key_tok = shown_tokens(key_mask, i, tokens, col_tok)
                    k_tile = load_tile(k_place, key_tok, D)  # [C, D]
                    seen = sees_pairs(row_sight, col_sight, LONG_AXIS)
                    chunk_at = class_at + chunk * (ROWS * CHUNK)
                    s = chunk_logits(q_tile, k_tile, bias_source, chunk_at, seen, PRECISION)
                    s = hide_logits(s, key_mask, key_tok[None, :])
                    v_tile = load_tile(v_place, key_tok, DV)  # [C, DV]
                    m, total, acc = attend(
                        s, v_tile, (m, total, acc), to_log2, dropout, row_tok, col_tok, batch_head, True, PRECISION
                    )
            row_at = i * tokens * heads + head  # out and lse are contiguous, heads after tokens
            # Zero where bias or mask hide everything and a row sees nothing.
            divisor = tl.maximum(total, 1e-30, propagate_nan=tl.PropagateNan.ALL)
            store_tile((out + row_at * DV, heads * DV), row_tok, acc * (1 / divisor)[:, None], DV)
            store_row(lse + row_at, row_tok, heads, m * scale + tl.log2(total) * LN2)
