"""Primitives that the kernels share: loading and storing tiles of tokens, the bias of a pair, dropout.

Names in all kernels: a row is a token that a tile computes for, a column one that it reads. A token, `_tok`, is the
base of its tile plus an offset that all tiles of a class share, `_off`; both are negative in empty slots. `_at` values
are pointers. Tile values say their shape, `[R, C]` or `[R, D]`.

Arguments of all kernels:
    layout: Index arrays of a plan: runs, bases, rows, columns.
    codes: Those of rows and columns, if there is a bias: a pair's entry is the sum of both.
    strides: Of each tensor of tokens, how far it is to the next batch item, token and head.
    bias_head: Distance from one head's bias to the next.
    seed, keep_from, keep_scale: Dropout, if there is a seed.
    key_mask: `[batch, tokens]`, 0 where a key is hidden from all queries.
    D, DV: Channels of queries and keys, and of values.
    LONG_AXIS: Whether words alone do not tell who sees whom.
A kernel is compiled anew, without what would read it, where an optional tensor is None. Numbers stand alone unless each
of their values may be worth a kernel of its own: Triton specializes on all numbers in a tuple.
"""

import triton
import triton.language as tl

from dinat_triton.kernels.configs import padded

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Where running maxima start, and finite, so that they never meet (-inf) - (-inf). Lower logits count as -inf.
LOWEST = tl.constexpr(-1e30)
# Arguments of which no value is worth a kernel of its own.
RUNTIME = ["batch", "batch_step", "tokens", "heads", "group", "bias_head", "max_chunks", "keep_from"]

padded = triton.constexpr_function(padded)


@triton.jit
def find_head(x, strides, item, head):
    """First token of one head of a batch item, and the step from token to token."""
    of_item, of_token, of_head = strides
    return x + item * of_item + head * of_head, of_token


@triton.jit
def tile_at(place, tok, CHANNELS: tl.constexpr):
    """Addresses of the channels of some tokens, `[tokens, padded(CHANNELS)]`, and which of them exist.

    `place` is what `find_head` found.
    """
    at, stride = place
    BLOCK: tl.constexpr = padded(CHANNELS)
    channel = tl.arange(0, BLOCK)
    exists = tok[:, None] >= 0
    if CHANNELS != BLOCK:
        exists &= channel[None, :] < CHANNELS
    return at + tok[:, None] * stride + channel[None, :], exists


@triton.jit
def load_tile(place, tok, CHANNELS: tl.constexpr):
    """Channels of some tokens; zeros in empty slots and past the last channel."""
    at, exists = tile_at(place, tok, CHANNELS)
    return tl.load(at, mask=exists, other=0.0)


@triton.jit
def store_tile(place, tok, tile, CHANNELS: tl.constexpr):
    """Writes the channels of some tokens."""
    at, exists = tile_at(place, tok, CHANNELS)
    tl.store(at, tile.to(at.dtype.element_ty), mask=exists)


@triton.jit
def load_row(at, tok, stride):
    """One number per token of one head; zero in empty slots."""
    return tl.load(at + tok * stride, mask=tok >= 0, other=0.0)


@triton.jit
def load_lse2(lse_at, tok, stride):
    """Log-sum-exps to base 2, finite: less than any logit where a row sees nothing, whose logits are all -inf."""
    return tl.maximum(load_row(lse_at, tok, stride), LOWEST, propagate_nan=tl.PropagateNan.ALL) * LOG2E


@triton.jit
def store_row(at, tok, stride, values):
    """Writes one number per token of one head."""
    tl.store(at + tok * stride, values, mask=tok >= 0)


@triton.jit
def load_pair(at, tok, stride):
    """Two neighboring numbers per token of one head; zeros in empty slots."""
    at = at + tok[:, None] * stride + tl.arange(0, 2)[None, :]
    return tl.split(tl.load(at, mask=tok[:, None] >= 0, other=0.0))


@triton.jit
def store_pair(at, tok, stride, first, second):
    """Writes two neighboring numbers per token of one head."""
    at = at + tok[:, None] * stride + tl.arange(0, 2)[None, :]
    tl.store(at, tl.join(first, second), mask=tok[:, None] >= 0)


@triton.jit
def shown_tokens(key_mask, item, tokens, tok):
    """Keys, with empty slots where the mask of a batch item hides them, so that nothing of theirs is read."""
    if key_mask is not None:
        shown = tl.load(key_mask + item * tokens + tok, mask=tok >= 0, other=0)
        tok = tl.where(shown != 0, tok, -1)
    return tok


@triton.jit
def hide_logits(s, key_mask, key_tok):
    """Logits, -inf for keys that the mask hides; their tokens, from `shown_tokens`, broadcast to the logits."""
    if key_mask is not None:
        s = tl.where(key_tok >= 0, s, float("-inf"))
    return s


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """A matrix product summed in float32, on top of `acc`."""
    if PRECISION == "interpreted":  # the interpreter would multiply the bits of bfloat16 as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc=acc, input_precision="ieee")
    return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def load_bias(at, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """The bias of every (row, column) pair of a chunk, `[ROWS, CHUNK]`, from a table in the order of `pair_at`.

    Read 16 bytes at a time and straight into an accumulator's place.
    """
    pairs = tl.reshape(tl.load(at + tl.arange(0, ROWS * CHUNK)), [CHUNK // 8, ROWS // 16, 8, 4, 2, 2])
    return tl.reshape(tl.permute(pairs, [1, 4, 2, 0, 3, 5]), [ROWS, CHUNK])


@triton.jit
def pair_at(n, ROWS: tl.constexpr):
    """(row, column) in place `n` of a chunk's table.

    In the order of matrix accumulators: a thread has 2 neighboring columns in 2 rows that are 8 apart, one after the
    other, then come the next 4 columns' threads, then the next row's.
    """
    row = n // 128 % (ROWS // 16) * 16 + n // 2 % 2 * 8 + n // 16 % 8
    return row, n // (8 * ROWS) * 8 + n // 4 % 4 * 2 + n % 2


@triton.jit
def sees(row_sight, col_sight, LONG_AXIS: tl.constexpr):
    """Whether rows see columns: their words share no bit, and on a long axis the row's window holds the column."""
    row_word, first, count = row_sight
    col_word, place = col_sight
    seen = (row_word & col_word) == 0
    if LONG_AXIS:
        seen &= (place - first).to(tl.uint32) < count.to(tl.uint32)
    return seen


@triton.jit
def sees_pairs(row_sight, col_sight, LONG_AXIS: tl.constexpr):
    """True where a row sees a column, `[R, C]`."""
    word, first, count = row_sight
    row_sight = word[:, None], first[:, None], count[:, None]
    word, place = col_sight
    return sees(row_sight, (word[None, :], place[None, :]), LONG_AXIS)


@triton.jit
def pair_bias(rpb, head_at, codes, tile_class, chunk, max_chunks, seen, inv_scale):
    """Start of the logits' accumulator, `[R, C]`: bias / scale, and -inf where a row does not see a column."""
    if rpb is None:
        bias = tl.where(seen, 0.0, float("-inf"))
    else:
        row_codes, col_codes = codes
        ROWS: tl.constexpr = seen.shape[0]
        CHUNK: tl.constexpr = seen.shape[1]
        row_code = tl.load(row_codes + tile_class * ROWS + tl.arange(0, ROWS))
        col_code = tl.load(col_codes + (tile_class * max_chunks + chunk) * CHUNK + tl.arange(0, CHUNK))
        bias = find_bias(rpb + head_at, row_code[:, None] + col_code[None, :], seen, inv_scale)
    return bias


@triton.jit
def find_bias(rpb, index, seen, inv_scale):
    """Bias / scale of pairs that see each other, and -inf of others."""
    return tl.load(rpb + index, mask=seen, other=float("-inf")).to(tl.float32) * inv_scale


@triton.jit
def chunk_logits(row_tile, col_tile, table, chunk_at, seen, PRECISION: tl.constexpr):
    """Logits over the scale of one of several chunks, `[R, C]`; without a bias there is no table to start from."""
    if table is None:
        s = tl.where(seen, dot(row_tile, tl.trans(col_tile), None, PRECISION), float("-inf"))
    else:
        bias = load_bias(table + chunk_at, row_tile.shape[0], col_tile.shape[0])
        s = dot(row_tile, tl.trans(col_tile), bias, PRECISION)
    return s


@triton.jit
def read_run(runs, heads):
    """A program's run of tiles of one class: (head, class, first tile, end, chunks)."""
    run, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    at = runs + 4 * run
    return head, tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def read_items(batch, batch_step):
    """A program's part of the batch: (first item, end)."""
    first = tl.program_id(1) * batch_step
    return first, tl.minimum(first + batch_step, batch)


@triton.jit
def read_row(rows, tile_class, row, ROWS: tl.constexpr, LONG_AXIS: tl.constexpr):
    """Reads offset, and what `sees` compares, of some rows of a class. Where no axis is long, that is words alone."""
    at = rows + tile_class * ((4 if LONG_AXIS else 2) * ROWS) + row
    word = tl.load(at + ROWS).to(tl.int32)
    first, count = word, word
    if LONG_AXIS:
        first, count = tl.load(at + 2 * ROWS).to(tl.int32), tl.load(at + 3 * ROWS).to(tl.int32)
    return tl.load(at), (word, first, count)


@triton.jit
def read_column(columns, tile_class, column, span, LONG_AXIS: tl.constexpr):
    """Reads them of some columns of a class."""
    at = columns + tile_class * ((3 if LONG_AXIS else 2) * span) + column
    word = tl.load(at + span).to(tl.int32)
    place = tl.load(at + 2 * span).to(tl.int32) if LONG_AXIS else word
    return tl.load(at), (word, place)


@triton.jit
def read_rows(rows, tile_class, ROWS: tl.constexpr, LONG_AXIS: tl.constexpr):
    """`read_row` of all rows of a class, `[R]` each."""
    return read_row(rows, tile_class, tl.arange(0, ROWS), ROWS, LONG_AXIS)


@triton.jit
def read_columns(columns, tile_class, chunk, max_chunks, CHUNK: tl.constexpr, LONG_AXIS: tl.constexpr):
    """`read_column` of a chunk of a class's columns, `[C]` each."""
    return read_column(columns, tile_class, chunk * CHUNK + tl.arange(0, CHUNK), max_chunks * CHUNK, LONG_AXIS)


@triton.jit
def read_bases(bases, tile):
    """The tokens that the offsets of a tile's rows and columns count from."""
    return tl.load(bases + 2 * tile), tl.load(bases + 2 * tile + 1)


@triton.jit
def drop(x, dropout, query_tok, key_tok, batch_head):
    """Applies dropout, if there is a seed, with the same draw per pair as `dinat_triton.dropout`."""
    seed, keep_from, keep_scale = dropout
    if seed is not None:
        zero = tl.zeros_like((query_tok + key_tok).to(tl.int32))
        key_word, query_word = zero + key_tok.to(tl.int32), zero + query_tok.to(tl.int32)
        bits, _, _, _ = tl.philox(tl.load(seed), key_word, query_word, zero + batch_head, zero)
        x = tl.where(bits.to(tl.uint32, bitcast=True) >= keep_from.to(tl.uint32), x * keep_scale, 0.0)
    return x


@triton.jit(do_not_specialize=["offsets", "max_chunks"])
def table_kernel(
    rpb, table, rows, columns, row_codes, col_codes, offsets, max_chunks, scale,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, LONG_AXIS: tl.constexpr,
):  # fmt: skip
    """Writes the bias of all pairs, chunk by chunk of a tile class. Grid (blocks of a chunk, chunks, heads)."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile_class, chunk = tl.program_id(1) // max_chunks, tl.program_id(1) % max_chunks
    row, col = pair_at(place, ROWS)
    _row_off, row_sight = read_row(rows, tile_class, row, ROWS, LONG_AXIS)
    _col_off, col_sight = read_column(columns, tile_class, chunk * CHUNK + col, max_chunks * CHUNK, LONG_AXIS)
    index = tl.load(row_codes + tile_class * ROWS + row) + tl.load(col_codes + tl.program_id(1) * CHUNK + col)
    head = tl.program_id(2)
    bias = find_bias(rpb + head * offsets, index, sees(row_sight, col_sight, LONG_AXIS), 1 / scale)
    chunk_of_head = head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(table + chunk_of_head * (ROWS * CHUNK) + place, bias)
