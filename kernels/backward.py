"""The fused backward: gradients of q, k, v and of the bias. No atomics, so equal runs give equal bits.

With P the probabilities, dP = dO . v, delta = rowsum(P * dP) and dL the gradient of the log-sum-exp:
    dS = P * (dP - delta + dL),  dq = scale * dS . k,  dk = scale * dS^T . q,  dv = P^T . dO,  dbias = sum of dS

Loops over batch items and heads hoist nothing (disable_licm): the addresses they would keep cost registers that spill.

A gradient that nobody wants is None, and so what only it needs is not computed.

Closed tiles, whose columns no other tile reads, take one pass with five products. Others take two: tiles of queries for
dq and the bias, then tiles of keys, on the transposed plan, for dk and dv.
"""

import triton
import triton.language as tl

from dinat_triton.kernels.primitives import (
    LOG2E,
    RUNTIME,
    chunk_logits,
    dot,
    drop,
    find_head,
    hide_logits,
    load_lse2,
    load_pair,
    load_row,
    load_tile,
    padded,
    pair_bias,
    read_bases,
    read_column,
    read_columns,
    read_items,
    read_row,
    read_rows,
    read_run,
    sees,
    sees_pairs,
    shown_tokens,
    store_pair,
    store_tile,
)


@triton.jit(do_not_specialize=RUNTIME)
def closed_backward_kernel(
    q, k, v, lse, grad_out, grad_lse, grad_q, grad_k, grad_v, grad_pairs, rpb, seed, key_mask, layout, codes, strides,
    batch, batch_step, tokens, heads, bias_head, scale, keep_from: tl.uint32, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, LONG_AXIS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (runs * heads, batch splits), as the forward; the bias gradient of a program stays in registers."""
    runs, bases, rows, columns = layout
    q_strides, k_strides, v_strides, dq_strides, dk_strides, dv_strides, do_strides = strides
    head, tile_class, first, end, _ = read_run(runs, heads)
    first_item, end_item = read_items(batch, batch_step)
    row, col = tl.arange(0, ROWS), tl.arange(0, CHUNK)
    row_off, row_sight = read_rows(rows, tile_class, ROWS, LONG_AXIS)
    col_off, col_sight = read_columns(columns, tile_class, 0, 1, CHUNK, LONG_AXIS)
    seen = sees_pairs(row_sight, col_sight, LONG_AXIS)
    bias = pair_bias(rpb, head * bias_head, codes, tile_class, 0, 1, seen, 1 / scale)  # [R, C]
    to_log2 = scale * LOG2E
    grad_bias = tl.zeros((ROWS, CHUNK), tl.float32)
    dropout = (seed, keep_from, keep_scale)

    for tile in range(first, end):
        row_base, col_base = read_bases(bases, tile)
        row_tok = row_base + row_off
        col_tok = col_base + col_off
        for item in tl.range(first_item, end_item, disable_licm=True):
            i = tl.cast(item, tl.int64)
            row_at = i * tokens * heads + head
            q_tile = load_tile(find_head(q, q_strides, i, head), row_tok, D)  # [R, D]
            key_tok = shown_tokens(key_mask, i, tokens, col_tok)
            k_tile = load_tile(find_head(k, k_strides, i, head), key_tok, D)  # [C, D]
            v_tile = load_tile(find_head(v, v_strides, i, head), key_tok, DV)  # [C, DV]
            do_tile = load_tile(find_head(grad_out, do_strides, i, head), row_tok, DV)  # [R, DV]

            s = dot(q_tile, tl.trans(k_tile), bias, PRECISION)  # [R, C]
            s = hide_logits(s, key_mask, key_tok[None, :])
            p = tl.exp2(s * to_log2 - load_lse2(lse + row_at, row_tok, heads)[:, None])
            draw_row, draw_col = row_tok[:, None], col_tok[None, :]
            batch_head = item * heads + head
            dropped = drop(p, dropout, draw_row, draw_col, batch_head)
            # Before dP: the copy of P that goes into this product is gone when dP needs its registers.
            dv_tile = dot(tl.trans(dropped.to(do_tile.dtype)), do_tile, None, PRECISION)  # [C, DV]
            if grad_v is not None:
                store_tile(find_head(grad_v, dv_strides, i, head), col_tok, dv_tile, DV)
            dp = dot(do_tile, tl.trans(v_tile), None, PRECISION)  # [R, C]
            dp = drop(dp, dropout, draw_row, draw_col, batch_head)
            delta = tl.sum(p * dp, 1)
            if grad_lse is not None:
                delta -= load_row(grad_lse + row_at, row_tok, heads)
            ds = p * (dp - delta[:, None])
            if grad_pairs is not None:
                grad_bias += ds
            ds = ds.to(q_tile.dtype)
            if grad_q is not None:
                dq_tile = dot(ds, k_tile, None, PRECISION) * scale  # [R, D]
                store_tile(find_head(grad_q, dq_strides, i, head), row_tok, dq_tile, D)
            if grad_k is not None:
                dk_tile = dot(tl.trans(ds), q_tile, None, PRECISION) * scale  # [C, D]
                store_tile(find_head(grad_k, dk_strides, i, head), col_tok, dk_tile, D)

    if grad_pairs is not None:
        program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        tl.store(grad_pairs + (program * ROWS + row[:, None]) * CHUNK + col[None, :], grad_bias)


@triton.jit(do_not_specialize=RUNTIME)
def query_backward_kernel(
    q, k, v, out, lse, grad_out, grad_lse, stats, grad_q, grad_pairs, bias_source, seed, key_mask,
    layout, codes, strides,
    batch, batch_step, tokens, heads, group, bias_head, max_chunks, scale, keep_from: tl.uint32, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, LONG_AXIS: tl.constexpr,
    ALL_CHUNKS: tl.constexpr, GRAD_QUERY: tl.constexpr, GRAD_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of queries: dq and delta, and the bias gradient of one chunk, which stays in registers.

    Grid (runs * heads, batch splits, chunks or 1). One launch does all where one chunk holds all columns. Else dq comes
    from a launch over ALL_CHUNKS that reads the bias from its table, and the bias gradient from one program per chunk.
    Delta must be known before the first of several chunks, so there it is rowsum(dO * out), which is the same.
    """
    runs, bases, rows, columns = layout
    q_strides, k_strides, v_strides, dq_strides, do_strides = strides
    head, tile_class, first, end, chunks = read_run(runs, heads)
    first_item, end_item = read_items(batch, batch_step)
    row_off, row_sight = read_rows(rows, tile_class, ROWS, LONG_AXIS)
    if ALL_CHUNKS:
        class_at = tl.multiple_of(head.to(tl.int64) * bias_head, 16) + tile_class * (ROWS * CHUNK) * max_chunks
    else:
        chunk = tl.program_id(2)
        col_off, col_sight = read_columns(columns, tile_class, chunk, max_chunks, CHUNK, LONG_AXIS)
        seen = sees_pairs(row_sight, col_sight, LONG_AXIS)
        bias = pair_bias(bias_source, head * bias_head, codes, tile_class, chunk, max_chunks, seen, 1 / scale)  # [R, C]
    to_log2 = scale * LOG2E
    grad_bias = tl.zeros((ROWS, CHUNK), tl.float32)
    dropout = (seed, keep_from, keep_scale)

    for tile in tl.range(first, end, disable_licm=True):
        row_base, col_base = read_bases(bases, tile)
        row_tok = row_base + row_off
        if not ALL_CHUNKS:
            col_tok = col_base + col_off
        for item in tl.range(first_item, end_item, disable_licm=True):
            i = tl.cast(item, tl.int64)
            row_at = i * tokens * heads + head
            q_tile = load_tile(find_head(q, q_strides, i, head), row_tok, D)  # [R, D]
            do_tile = load_tile(find_head(grad_out, do_strides, i, head), row_tok, DV)  # [R, DV]
            kv_head = head // group
            k_place = find_head(k, k_strides, i, kv_head)
            v_place = find_head(v, v_strides, i, kv_head)
            if GRAD_QUERY:
                row_lse2 = load_lse2(lse + row_at, row_tok, heads)
                delta = tl.zeros((ROWS,), tl.float32)
                if grad_lse is not None:
                    delta -= load_row(grad_lse + row_at, row_tok, heads)
                if ALL_CHUNKS:
                    out_tile = load_tile((out + row_at * DV, heads * DV), row_tok, DV)  # [R, DV]
                    delta += tl.sum(out_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
                    store_pair(stats + 2 * row_at, row_tok, 2 * heads, row_lse2, delta)
            else:
                row_lse2, delta = load_pair(stats + 2 * row_at, row_tok, 2 * heads)
            dq_tile = tl.zeros((ROWS, padded(D)), tl.float32)
            for chunk in range(chunks if ALL_CHUNKS else 1):
                if ALL_CHUNKS:
                    col_off, col_sight = read_columns(columns, tile_class, chunk, max_chunks, CHUNK, LONG_AXIS)
                    col_tok = col_base + col_off
                key_tok = shown_tokens(key_mask, i, tokens, col_tok)
                k_tile = load_tile(k_place, key_tok, D)  # [C, D]
                if ALL_CHUNKS:
                    seen = sees_pairs(row_sight, col_sight, LONG_AXIS)
                    chunk_at = class_at + chunk * (ROWS * CHUNK)
                    s = chunk_logits(q_tile, k_tile, bias_source, chunk_at, seen, PRECISION)
                else:
                    s = dot(q_tile, tl.trans(k_tile), bias, PRECISION)  # [R, C]
                s = hide_logits(s, key_mask, key_tok[None, :])
                v_tile = load_tile(v_place, key_tok, DV)  # [C, DV]
                p = tl.exp2(s * to_log2 - row_lse2[:, None])
                dp = dot(do_tile, tl.trans(v_tile), None, PRECISION)  # [R, C]
                dp = drop(dp, dropout, row_tok[:, None], col_tok[None, :], item * heads + head)
                if GRAD_QUERY and not ALL_CHUNKS:
                    delta += tl.sum(p * dp, 1)
                    store_pair(stats + 2 * row_at, row_tok, 2 * heads, row_lse2, delta)
                ds = p * (dp - delta[:, None])
                if GRAD_BIAS:
                    grad_bias += ds
                if GRAD_QUERY and grad_q is not None:
                    dq_tile = dot(ds.to(k_tile.dtype), k_tile, dq_tile, PRECISION)
            if GRAD_QUERY and grad_q is not None:
                store_tile(find_head(grad_q, dq_strides, i, head), row_tok, dq_tile * scale, D)

    if GRAD_BIAS:
        program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        row, col = tl.arange(0, ROWS), tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
        tl.store(grad_pairs + (program * ROWS + row[:, None]) * (max_chunks * CHUNK) + col[None, :], grad_bias)


@triton.jit(do_not_specialize=RUNTIME)
def key_backward_kernel(
    q, k, v, grad_out, stats, grad_k, grad_v, table, seed, key_mask, layout, strides,
    batch, batch_step, tokens, heads, group, bias_head, max_chunks, scale, keep_from: tl.uint32, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, LONG_AXIS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of keys on the transposed plan: dk and dv, over the queries of every head that shares the key's.

    Grid (runs * key heads, batch splits).
    """
    runs, bases, rows, columns = layout
    q_strides, k_strides, v_strides, dk_strides, dv_strides, do_strides = strides
    kv_head, tile_class, first, end, chunks = read_run(runs, heads // group)
    first_item, end_item = read_items(batch, batch_step)
    row_off, row_sight = read_rows(rows, tile_class, ROWS, LONG_AXIS)
    to_log2 = scale * LOG2E
    dropout = (seed, keep_from, keep_scale)

    for tile in range(first, end):
        row_base, col_base = read_bases(bases, tile)
        row_tok = row_base + row_off
        for item in tl.range(first_item, end_item, disable_licm=True):
            i = tl.cast(item, tl.int64)
            key_tok = shown_tokens(key_mask, i, tokens, row_tok)
            k_tile = load_tile(find_head(k, k_strides, i, kv_head), key_tok, D)  # [R, D]
            v_tile = load_tile(find_head(v, v_strides, i, kv_head), key_tok, DV)  # [R, DV]
            dk_tile = tl.zeros((ROWS, padded(D)), tl.float32)
            dv_tile = tl.zeros((ROWS, padded(DV)), tl.float32)
            for head in tl.range(kv_head * group, kv_head * group + group, disable_licm=True):
                class_at = tl.multiple_of(tl.cast(head, tl.int64) * bias_head, 16)
                class_at += tile_class * (ROWS * CHUNK) * max_chunks
                col_at = i * tokens * heads + head
                for chunk in range(chunks):
                    col_off, col_sight = read_columns(columns, tile_class, chunk, max_chunks, CHUNK, LONG_AXIS)
                    col_tok = col_base + col_off
                    q_tile = load_tile(find_head(q, q_strides, i, head), col_tok, D)  # [C, D]
                    do_tile = load_tile(find_head(grad_out, do_strides, i, head), col_tok, DV)  # [C, DV]
                    col_lse2, delta = load_pair(stats + 2 * col_at, col_tok, 2 * heads)
                    seen = sees_pairs(row_sight, col_sight, LONG_AXIS)
                    s = chunk_logits(k_tile, q_tile, table, class_at + chunk * (ROWS * CHUNK), seen, PRECISION)
                    s = hide_logits(s, key_mask, key_tok[:, None])
                    p = tl.exp2(s * to_log2 - col_lse2[None, :])
                    draw_row, draw_col = row_tok[:, None], col_tok[None, :]
                    batch_head = item * heads + head
                    dropped = drop(p, dropout, draw_col, draw_row, batch_head)
                    # Before dP: the copy of P that goes into this product is gone when dP needs its registers.
                    dv_tile = dot(dropped.to(do_tile.dtype), do_tile, dv_tile, PRECISION)
                    dp = dot(v_tile, tl.trans(do_tile), None, PRECISION)  # [R, C]
                    dp = drop(dp, dropout, draw_col, draw_row, batch_head)
                    ds = p * (dp - delta[None, :])
                    dk_tile = dot(ds.to(q_tile.dtype), q_tile, dk_tile, PRECISION)
            if grad_k is not None:
                store_tile(find_head(grad_k, dk_strides, i, kv_head), row_tok, dk_tile * scale, D)
            if grad_v is not None:
                store_tile(find_head(grad_v, dv_strides, i, kv_head), row_tok, dv_tile, DV)


@triton.jit(do_not_specialize=["programs", "splits", "heads", "pairs"])
def sum_programs_kernel(
    partials, sums, first_run, programs, splits, heads, pairs,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Adds up the bias gradients of the programs of each tile class, in a fixed order.

    Grid (blocks of pairs, classes, heads); `partials` is [splits, runs, heads, pairs].
    """
    tile_class, head = tl.program_id(1), tl.program_id(2)
    first, end = tl.load(first_run + tile_class), tl.load(first_run + tile_class + 1)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    count = (end - first) * splits
    for start in range(0, count, STEP):
        n = start + tl.arange(0, STEP)
        run, split = first + n // splits, n % splits
        program = (split * programs + run * heads + head).to(tl.int64)
        at = partials + program[:, None] * pairs + pair[None, :]
        total += tl.sum(tl.load(at, mask=(n < count)[:, None], other=0.0), 0)
    tl.store(sums + (head.to(tl.int64) * tl.num_programs(1) + tile_class) * pairs + pair, total)


@triton.jit(do_not_specialize=["classes", "offsets", "span"])
def fold_bias_kernel(
    sums, grad_rpb, rows, columns, row_codes, col_codes, entry_column, row_column, classes, offsets, span,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LONG_AXIS: tl.constexpr,
):  # fmt: skip
    """Adds up the pairs of each bias entry, in a fixed order. Grid (offsets, heads).

    A row of a class has the entry with one column at most, which is tried.
    """
    offset, head = tl.program_id(0), tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, classes * ROWS, BLOCK):
        n = start + tl.arange(0, BLOCK)
        exists = n < classes * ROWS
        n = tl.where(exists, n, 0)
        tile_class, row = n // ROWS, n % ROWS
        col = tl.load(entry_column + tile_class * offsets + offset) + tl.load(row_column + n)
        exists &= (col >= 0) & (col < span)
        col = tl.where(exists, col, 0)
        _row_off, row_sight = read_row(rows, tile_class, row, ROWS, LONG_AXIS)
        _col_off, col_sight = read_column(columns, tile_class, col, span, LONG_AXIS)
        code = tl.load(row_codes + n) + tl.load(col_codes + tile_class * span + col)
        exists &= sees(row_sight, col_sight, LONG_AXIS) & (code == offset)
        pair = (head * classes * ROWS + n).to(tl.int64) * span + col
        total += tl.load(sums + pair, mask=exists, other=0.0)
    tl.store(grad_rpb + head * offsets + offset, tl.sum(total, 0).to(grad_rpb.dtype.element_ty))
