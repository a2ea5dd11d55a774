"""The fused forward: softmax(scale * q . k + bias) . v, tile by tile of a plan."""

import triton
import triton.language as tl

from dinat_triton.kernels.primitives import (
    LN2,
    LOG2E,
    RUNTIME,
    dot,
    drop,
    load_bias,
    load_tile,
    pair_bias,
    read_run,
    store_row,
    store_tile,
)

# Below any logit, and finite: a running maximum that starts here never meets (-inf) - (-inf).
LOWEST = tl.constexpr(-1e30)


@triton.jit
def attend(
    q_tile, k_at, v_at, k_token, v_token, row_tok, col_tok, bias, m, total, acc, to_log2,
    seed, keep_from, keep_scale, batch_head,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ONLINE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends to one chunk of columns; ONLINE adds it to the maximum, sum and output of the chunks before."""
    k_tile = load_tile(k_at, col_tok, k_token, D, BLOCK_D)  # [C, D]
    v_tile = load_tile(v_at, col_tok, v_token, DV, BLOCK_DV)  # [C, DV]
    # The bias is the accumulator: adding it after the product would compute the exponentials in two layouts.
    s = dot(q_tile, tl.trans(k_tile), bias, PRECISION)  # [R, C]
    m_next = tl.max(s, 1)
    if ONLINE:
        m_next = tl.maximum(m, m_next)
    p = tl.exp2(s * to_log2 - (m_next * to_log2)[:, None])
    total_next = tl.sum(p, 1)
    if DROPOUT:
        p = drop(p, seed, keep_from, keep_scale, row_tok[:, None], col_tok[None, :], batch_head)
    if ONLINE:
        shrink = tl.exp2((m - m_next) * to_log2)
        total_next += total * shrink
        acc = dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], PRECISION)  # [R, DV]
    else:
        acc = dot(p.to(v_tile.dtype), v_tile, None, PRECISION)
    return m_next, total_next, acc


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    q, k, v, out, lse, bias_source, seed, row_tokens, col_tokens, runs, rel,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    batch, batch_step, tokens, heads, group, bias_head, max_chunks, scale, keep_from: tl.uint32, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, ONE_CHUNK: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (runs * heads, batch splits): a program walks one run of tiles over its part of the batch.

    One chunk: `bias_source` is rpb, and the tile's bias is gathered once and stays in registers. More: it is the table
    that `table_kernel` wrote, read chunk by chunk out of the cache.
    """
    head, tile_class, first, end, chunks = read_run(runs, heads)
    first_item = tl.program_id(1) * batch_step
    end_item = tl.minimum(first_item + batch_step, batch)
    row, col = tl.arange(0, ROWS), tl.arange(0, CHUNK)
    span = max_chunks * CHUNK
    class_at = tile_class * (ROWS * span)
    if ONE_CHUNK:
        rel_tile = tl.load(rel + class_at + row[:, None] * span + col[None, :])
        bias = pair_bias(bias_source, head * bias_head, rel_tile, 1 / scale, HAS_BIAS)  # [R, C]
    else:
        bias_at = bias_source + tl.multiple_of(head.to(tl.int64) * bias_head, 16) + class_at
    to_log2 = scale * LOG2E
    kv_head = head // group

    for tile in range(first, end):
        row_tok = tl.load(row_tokens + tile * ROWS + row)
        col_tok_at = col_tokens + tl.cast(tile, tl.int64) * span + col
        if ONE_CHUNK:
            col_tok = tl.load(col_tok_at)
        for item in tl.range(first_item, end_item, disable_licm=True):
            i = tl.cast(item, tl.int64)
            q_tile = load_tile(q + i * q_batch + head * q_head, row_tok, q_token, D, BLOCK_D)  # [R, D]
            k_at = k + i * k_batch + kv_head * k_head
            v_at = v + i * v_batch + kv_head * v_head
            m = tl.full((ROWS,), LOWEST, tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
            if ONE_CHUNK:
                m, total, acc = attend(
                    q_tile, k_at, v_at, k_token, v_token, row_tok, col_tok, bias, m, total, acc, to_log2,
                    seed, keep_from, keep_scale, item * heads + head,
                    D, DV, BLOCK_D, BLOCK_DV, False, DROPOUT, PRECISION,
                )  # fmt: skip
            else:
                for chunk in range(chunks):
                    m, total, acc = attend(
                        q_tile, k_at, v_at, k_token, v_token, row_tok, tl.load(col_tok_at + chunk * CHUNK),
                        load_bias(bias_at + chunk * (ROWS * CHUNK), ROWS, CHUNK), m, total, acc, to_log2,
                        seed, keep_from, keep_scale, item * heads + head,
                        D, DV, BLOCK_D, BLOCK_DV, True, DROPOUT, PRECISION,
                    )  # fmt: skip
            row_at = i * tokens * heads + head  # out and lse are contiguous, heads after tokens
            store_tile(out + row_at * DV, row_tok, heads * DV, acc * (1 / total)[:, None], DV, BLOCK_DV)
            store_row(lse + row_at, row_tok, heads, m * scale + tl.log2(total) * LN2)
