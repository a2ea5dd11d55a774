"""The fused backward: gradients of q, k, v and of the bias. No atomics, so equal runs give equal bits.

With P the probabilities, dP = dO . v, delta = rowsum(P * dP) and dL the gradient of the log-sum-exp:
    dS = P * (dP - delta + dL),  dq = scale * dS . k,  dk = scale * dS^T . q,  dv = P^T . dO,  dbias = sum of dS

Loops over batch items hoist nothing (disable_licm): the addresses they would keep cost registers that spill.

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
    load_lse2,
    load_pair,
    load_row,
    load_tile,
    pair_bias,
    read_bases,
    read_columns,
    read_rows,
    read_run,
    sees,
    store_pair,
    store_tile,
)


@triton.jit(do_not_specialize=RUNTIME[:-1])
def closed_backward_kernel(
    q, k, v, lse, grad_out, grad_lse, grad_q, grad_k, grad_v, grad_pairs, rpb, seed,
    runs, bases, rows, columns, guards,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    dq_batch, dq_token, dq_head, dk_batch, dk_token, dk_head, dv_batch, dv_token, dv_head, do_batch, do_token, do_head,
    batch, batch_step, tokens, heads, group, bias_head, scale, keep_from: tl.uint32, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (runs * heads, batch splits), as the forward; the bias gradient of a program stays in registers."""
    head, tile_class, first, end, _ = read_run(runs, heads)
    first_item = tl.program_id(1) * batch_step
    end_item = tl.minimum(first_item + batch_step, batch)
    row, col = tl.arange(0, ROWS), tl.arange(0, CHUNK)
    row_off, row_code, row_first, row_last = read_rows(rows, tile_class, ROWS)
    col_off, col_code, col_place = read_columns(columns, tile_class, 0, 1, CHUNK)
    seen = sees(row_first[:, None], row_last[:, None], col_place[None, :], guards)
    index = row_code[:, None] + col_code[None, :]
    bias = pair_bias(rpb, head * bias_head, index, seen, 1 / scale, HAS_BIAS)  # [R, C]
    to_log2 = scale * LOG2E
    grad_bias = tl.zeros((ROWS, CHUNK), tl.float32)

    for tile in range(first, end):
        row_base, col_base = read_bases(bases, tile)
        row_tok = row_base + row_off
        col_tok = col_base + col_off
        for item in tl.range(first_item, end_item, disable_licm=True):
            i = tl.cast(item, tl.int64)
            row_at = i * tokens * heads + head
            q_tile = load_tile(q + i * q_batch + head * q_head, row_tok, q_token, D, BLOCK_D)
            k_tile = load_tile(k + i * k_batch + head * k_head, col_tok, k_token, D, BLOCK_D)
            v_tile = load_tile(v + i * v_batch + head * v_head, col_tok, v_token, DV, BLOCK_DV)
            do_at = grad_out + i * do_batch + head * do_head
            do_tile = load_tile(do_at, row_tok, do_token, DV, BLOCK_DV)  # [R, DV]

            s = dot(q_tile, tl.trans(k_tile), bias, PRECISION)  # [R, C]
            p = tl.exp2(s * to_log2 - load_lse2(lse + row_at, row_tok, heads)[:, None])
            draw_row, draw_col = row_tok[:, None], col_tok[None, :]
            draw_head = item * heads + head
            dropped = p
            if DROPOUT:
                dropped = drop(p, seed, keep_from, keep_scale, draw_row, draw_col, draw_head)
            # Before dP: the copy of P that goes into this product is gone when dP needs its registers.
            dv_tile = dot(tl.trans(dropped.to(do_tile.dtype)), do_tile, None, PRECISION)  # [C, DV]
            dv_at = grad_v + i * dv_batch + head * dv_head
            store_tile(dv_at, col_tok, dv_token, dv_tile, DV, BLOCK_DV)
            dp = dot(do_tile, tl.trans(v_tile), None, PRECISION)  # [R, C]
            if DROPOUT:
                dp = drop(dp, seed, keep_from, keep_scale, draw_row, draw_col, draw_head)
            delta = tl.sum(p * dp, 1)
            if HAS_GRAD_LSE:
                delta -= load_row(grad_lse + row_at, row_tok, heads)
            ds = p * (dp - delta[:, None])
            if HAS_BIAS:
                grad_bias += ds
            ds = ds.to(q_tile.dtype)
            dq_tile = dot(ds, k_tile, None, PRECISION) * scale  # [R, D]
            dq_at = grad_q + i * dq_batch + head * dq_head
            store_tile(dq_at, row_tok, dq_token, dq_tile, D, BLOCK_D)
            dk_tile = dot(tl.trans(ds), q_tile, None, PRECISION) * scale  # [C, D]
            dk_at = grad_k + i * dk_batch + head * dk_head
            store_tile(dk_at, col_tok, dk_token, dk_tile, D, BLOCK_D)

    if HAS_BIAS:
        program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        tl.store(grad_pairs + (program * ROWS + row[:, None]) * CHUNK + col[None, :], grad_bias)


@triton.jit
def grad_probabilities(
    s, do_tile, v_at, v_token, row_lse2, to_log2, seed, keep_from, keep_scale, row_tok, col_tok, batch_head,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and dP of one chunk of columns, `[R, C]`."""
    v_tile = load_tile(v_at, col_tok, v_token, DV, BLOCK_DV)  # [C, DV]
    p = tl.exp2(s * to_log2 - row_lse2[:, None])
    dp = dot(do_tile, tl.trans(v_tile), None, PRECISION)  # [R, C]
    if DROPOUT:
        dp = drop(dp, seed, keep_from, keep_scale, row_tok[:, None], col_tok[None, :], batch_head)
    return p, dp


@triton.jit(do_not_specialize=RUNTIME)
def query_backward_kernel(
    q, k, v, out, lse, grad_out, grad_lse, stats, grad_q, grad_pairs, bias_source, seed,
    runs, bases, rows, columns, guards,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    dq_batch, dq_token, dq_head, do_batch, do_token, do_head,
    batch, batch_step, tokens, heads, group, bias_head, max_chunks, scale, keep_from: tl.uint32, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, ALL_CHUNKS: tl.constexpr, GRAD_QUERY: tl.constexpr, GRAD_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of queries: dq and delta, and the bias gradient of one chunk, which stays in registers.

    Grid (runs * heads, batch splits, chunks or 1). One launch does all where one chunk holds all columns. Else dq comes
    from a launch over ALL_CHUNKS that reads the bias from its table, and the bias gradient from one program per chunk.
    Delta must be known before the first of several chunks, so there it is rowsum(dO * out), which is the same.
    """
    head, tile_class, first, end, chunks = read_run(runs, heads)
    first_item = tl.program_id(1) * batch_step
    end_item = tl.minimum(first_item + batch_step, batch)
    row_off, row_code, row_first, row_last = read_rows(rows, tile_class, ROWS)
    if ALL_CHUNKS:
        class_at = tl.multiple_of(head.to(tl.int64) * bias_head, 16) + tile_class * (ROWS * CHUNK) * max_chunks
    else:
        col_off, col_code, col_place = read_columns(columns, tile_class, tl.program_id(2), max_chunks, CHUNK)
        seen = sees(row_first[:, None], row_last[:, None], col_place[None, :], guards)
        index = row_code[:, None] + col_code[None, :]
        bias = pair_bias(bias_source, head * bias_head, index, seen, 1 / scale, HAS_BIAS)  # [R, C]
    to_log2 = scale * LOG2E
    grad_bias = tl.zeros((ROWS, CHUNK), tl.float32)

    for tile in tl.range(first, end, disable_licm=True):
        row_base, col_base = read_bases(bases, tile)
        row_tok = row_base + row_off
        if not ALL_CHUNKS:
            col_tok = col_base + col_off
        for item in tl.range(first_item, end_item, disable_licm=True):
            i = tl.cast(item, tl.int64)
            row_at = i * tokens * heads + head
            q_tile = load_tile(q + i * q_batch + head * q_head, row_tok, q_token, D, BLOCK_D)
            do_at = grad_out + i * do_batch + head * do_head
            do_tile = load_tile(do_at, row_tok, do_token, DV, BLOCK_DV)  # [R, DV]
            k_at = k + i * k_batch + head // group * k_head
            v_at = v + i * v_batch + head // group * v_head
            if GRAD_QUERY:
                row_lse2 = load_lse2(lse + row_at, row_tok, heads)
                delta = tl.zeros((ROWS,), tl.float32)
                if HAS_GRAD_LSE:
                    delta -= load_row(grad_lse + row_at, row_tok, heads)
                if ALL_CHUNKS:
                    out_tile = load_tile(out + row_at * DV, row_tok, heads * DV, DV, BLOCK_DV)  # [R, DV]
                    delta += tl.sum(out_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
                    store_pair(stats + 2 * row_at, row_tok, 2 * heads, row_lse2, delta)
            else:
                row_lse2, delta = load_pair(stats + 2 * row_at, row_tok, 2 * heads)
            dq_tile = tl.zeros((ROWS, BLOCK_D), tl.float32)
            for chunk in range(chunks if ALL_CHUNKS else 1):
                if ALL_CHUNKS:
                    col_off, col_code, col_place = read_columns(columns, tile_class, chunk, max_chunks, CHUNK)
                    col_tok = col_base + col_off
                k_tile = load_tile(k_at, col_tok, k_token, D, BLOCK_D)  # [C, D]
                if ALL_CHUNKS:
                    s = chunk_logits(
                        q_tile, k_tile, bias_source, class_at + chunk * (ROWS * CHUNK),
                        row_first, row_last, col_place, guards, ROWS, CHUNK, HAS_BIAS, PRECISION,
                    )  # fmt: skip
                else:
                    s = dot(q_tile, tl.trans(k_tile), bias, PRECISION)  # [R, C]
                p, dp = grad_probabilities(
                    s, do_tile, v_at, v_token, row_lse2, to_log2,
                    seed, keep_from, keep_scale, row_tok, col_tok, item * heads + head,
                    DV, BLOCK_DV, DROPOUT, PRECISION,
                )  # fmt: skip
                if GRAD_QUERY and not ALL_CHUNKS:
                    delta += tl.sum(p * dp, 1)
                    store_pair(stats + 2 * row_at, row_tok, 2 * heads, row_lse2, delta)
                ds = p * (dp - delta[:, None])
                if GRAD_BIAS:
                    grad_bias += ds
                if GRAD_QUERY:
                    dq_tile = dot(ds.to(k_tile.dtype), k_tile, dq_tile, PRECISION)
            if GRAD_QUERY:
                dq_at = grad_q + i * dq_batch + head * dq_head
                store_tile(dq_at, row_tok, dq_token, dq_tile * scale, D, BLOCK_D)

    if GRAD_BIAS:
        program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        row, col = tl.arange(0, ROWS), tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
        tl.store(grad_pairs + (program * ROWS + row[:, None]) * (max_chunks * CHUNK) + col[None, :], grad_bias)


@triton.jit(do_not_specialize=RUNTIME)
def key_backward_kernel(
    q, k, v, grad_out, stats, grad_k, grad_v, table, seed,
    runs, bases, rows, columns, guards,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    dk_batch, dk_token, dk_head, dv_batch, dv_token, dv_head, do_batch, do_token, do_head,
    batch, batch_step, tokens, heads, group, bias_head, max_chunks, scale, keep_from: tl.uint32, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of keys on the transposed plan: dk and dv, over the queries of every head that shares the key's.

    Grid (runs * key heads, batch splits).
    """
    kv_heads = heads // group
    kv_head, tile_class, first, end, chunks = read_run(runs, kv_heads)
    first_item = tl.program_id(1) * batch_step
    end_item = tl.minimum(first_item + batch_step, batch)
    row_off, _row_code, row_first, row_last = read_rows(rows, tile_class, ROWS)
    to_log2 = scale * LOG2E

    for tile in range(first, end):
        row_base, col_base = read_bases(bases, tile)
        row_tok = row_base + row_off
        for item in tl.range(first_item, end_item, disable_licm=True):
            i = tl.cast(item, tl.int64)
            k_at = k + i * k_batch + kv_head * k_head
            k_tile = load_tile(k_at, row_tok, k_token, D, BLOCK_D)  # [R, D]
            v_at = v + i * v_batch + kv_head * v_head
            v_tile = load_tile(v_at, row_tok, v_token, DV, BLOCK_DV)  # [R, DV]
            dk_tile = tl.zeros((ROWS, BLOCK_D), tl.float32)
            dv_tile = tl.zeros((ROWS, BLOCK_DV), tl.float32)
            for head in range(kv_head * group, kv_head * group + group):
                class_at = tl.multiple_of(tl.cast(head, tl.int64) * bias_head, 16)
                class_at += tile_class * (ROWS * CHUNK) * max_chunks
                col_at = i * tokens * heads + head
                q_at = q + i * q_batch + head * q_head
                do_at = grad_out + i * do_batch + head * do_head
                for chunk in range(chunks):
                    col_off, _col_code, col_place = read_columns(columns, tile_class, chunk, max_chunks, CHUNK)
                    col_tok = col_base + col_off
                    q_tile = load_tile(q_at, col_tok, q_token, D, BLOCK_D)  # [C, D]
                    do_tile = load_tile(do_at, col_tok, do_token, DV, BLOCK_DV)  # [C, DV]
                    col_lse2, delta = load_pair(stats + 2 * col_at, col_tok, 2 * heads)
                    s = chunk_logits(
                        k_tile, q_tile, table, class_at + chunk * (ROWS * CHUNK),
                        row_first, row_last, col_place, guards, ROWS, CHUNK, HAS_BIAS, PRECISION,
                    )  # fmt: skip
                    p = tl.exp2(s * to_log2 - col_lse2[None, :])
                    draw_row, draw_col = row_tok[:, None], col_tok[None, :]
                    draw_head = item * heads + head
                    dropped = p
                    if DROPOUT:
                        dropped = drop(p, seed, keep_from, keep_scale, draw_col, draw_row, draw_head)
                    # Before dP: the copy of P that goes into this product is gone when dP needs its registers.
                    dv_tile = dot(dropped.to(do_tile.dtype), do_tile, dv_tile, PRECISION)
                    dp = dot(v_tile, tl.trans(do_tile), None, PRECISION)  # [R, C]
                    if DROPOUT:
                        dp = drop(dp, seed, keep_from, keep_scale, draw_col, draw_row, draw_head)
                    ds = p * (dp - delta[None, :])
                    dk_tile = dot(ds.to(q_tile.dtype), q_tile, dk_tile, PRECISION)
            dk_at = grad_k + i * dk_batch + kv_head * dk_head
            store_tile(dk_at, row_tok, dk_token, dk_tile * scale, D, BLOCK_D)
            dv_at = grad_v + i * dv_batch + kv_head * dv_head
            store_tile(dv_at, row_tok, dv_token, dv_tile, DV, BLOCK_DV)


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


@triton.jit(do_not_specialize=["guards", "classes", "offsets", "span"])
def fold_bias_kernel(
    sums, grad_rpb, rows, columns, entry_column, row_column, guards, classes, offsets, span,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the pairs of each bias entry, in a fixed order. Grid (offsets, heads).

    A row of a class has the entry with one column at most, which is tried.
    """
    offset, head = tl.program_id(0), tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, classes * ROWS, BLOCK):
        n = start + tl.arange(0, BLOCK)
        tile_class, row = n // ROWS, n % ROWS
        exists = tile_class < classes
        col = tl.load(entry_column + tile_class * offsets + offset, mask=exists, other=-1)
        col += tl.load(row_column + n, mask=exists, other=0)
        exists &= (col >= 0) & (col < span)
        row_at = rows + tile_class * (4 * ROWS) + row
        col_at = columns + tile_class * (3 * span) + col
        row_first = tl.load(row_at + 2 * ROWS, mask=exists, other=0)
        row_last = tl.load(row_at + 3 * ROWS, mask=exists, other=0)
        exists &= sees(row_first, row_last, tl.load(col_at + 2 * span, mask=exists, other=0), guards)
        index = tl.load(row_at + ROWS, mask=exists, other=0) + tl.load(col_at + span, mask=exists, other=0)
        pair = (head * classes * ROWS + n).to(tl.int64) * span + col
        total += tl.load(sums + pair, mask=exists & (index == offset), other=0.0)
    tl.store(grad_rpb + head * offsets + offset, tl.sum(total, 0).to(grad_rpb.dtype.element_ty))
