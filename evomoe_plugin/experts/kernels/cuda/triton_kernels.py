"""Kernels of the grouped FFN in Triton.

Rows are sorted by expert. `schedule` divides them into tiles of one expert each, on the device; a
program of a row kernel computes a tile times a block of columns, so that its cost is the same
whatever the load of its expert. Tables are int32 [any, 3]: expert, first row, end of the rows. The
grid has as many tiles as there can be; those left over have expert E and end at once.

No kernel adds with atomics: results do not depend on the order of programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evomoe_plugin.experts.kernels.cuda.triton_math import (
    activate,
    derive,
    dot,
    drop,
    place,
    tile_of,
    tokens_of,
)

GROUP = 8
"""Tiles of rows that share blocks of columns, in `place`."""


def _config(BN: int, BK: int, num_warps: int, num_stages: int, **others: int) -> triton.Config:
    return triton.Config({"BN": BN, "BK": BK, **others}, num_warps, num_stages)


# Tried at the first call for each key; the interpreter takes the first, with small blocks.
ONE_PRODUCT = [
    _config(128, 64, 8, 3),
    _config(128, 32, 8, 4),
    _config(64, 64, 4, 4),
    _config(64, 32, 4, 3),
]
TWO_PRODUCTS = [
    _config(64, 64, 8, 3),
    _config(64, 32, 4, 4),
    _config(64, 32, 8, 3),
]
WEIGHT_GRADIENT = [
    _config(128, 64, 8, 3, BM=128),
    _config(128, 32, 8, 4, BM=128),
    _config(128, 32, 4, 4, BM=128),
    _config(64, 64, 4, 3, BM=64),
]
BACKWARD_COLUMNS = 64
"""Block of `down_backward`: fixed, since the sums over columns depend on it."""
BACKWARD = [
    _config(BACKWARD_COLUMNS, 64, 8, 3),
    _config(BACKWARD_COLUMNS, 32, 8, 4),
    _config(BACKWARD_COLUMNS, 32, 8, 2),
]
if triton.knobs.runtime.interpret:
    ONE_PRODUCT = TWO_PRODUCTS = [_config(32, 32, 4, 1)]
    WEIGHT_GRADIENT = [_config(32, 32, 4, 1, BM=32)]
    BACKWARD_COLUMNS = 32
    BACKWARD = [_config(BACKWARD_COLUMNS, 32, 4, 1)]


def _tuned(configs: list[triton.Config], *key: str):
    """The fastest of `configs`, by key and dtypes; kept on disk, so that restarts choose alike."""
    return triton.autotune(configs, ["D", "F", *key], cache_results=True)


@triton.jit
def schedule(
    counts,
    tiles,
    segments,
    tile_starts,
    num_tiles,
    most,
    ONLY_LONG: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the tables.

    Args:
        counts: [E], rows of each expert.
        tiles: [num_tiles, 3], of at most `most` rows; with ONLY_LONG of experts with more alone.
        segments: [E, 3], all rows of an expert; the longest first.
        tile_starts: [E + 1], the first tile of each expert.
    """
    es = tl.arange(0, BE)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(counts + es, mask=es < E, other=0).to(tl.int32)
    pieces = (rows + most - 1) // most
    if ONLY_LONG:
        pieces = tl.where(rows > most, pieces, 0)

    has_ended = tl.cumsum(pieces, 0)[None, :] <= index[:, None]
    expert = tl.sum((has_ended & (es < E)[None, :]).to(tl.int32), 1)
    first = tl.sum(tl.where(has_ended, rows[None, :], 0), 1)
    end = tl.sum(tl.where(es[None, :] <= expert[:, None], rows[None, :], 0), 1)
    begin = first + (index - tl.sum(tl.where(has_ended, pieces[None, :], 0), 1)) * most
    is_tile = index < num_tiles
    tl.store(tiles + 3 * index, expert, mask=is_tile)
    tl.store(tiles + 3 * index + 1, begin, mask=is_tile)
    tl.store(tiles + 3 * index + 2, tl.minimum(begin + most, end), mask=is_tile)

    is_before = es[None, :] < index[:, None]
    starts = tl.sum(tl.where(is_before, pieces[None, :], 0), 1)
    tl.store(tile_starts + index, starts, mask=index <= E)
    mine = tl.load(counts + index, mask=index < E, other=0).to(tl.int32)
    is_longer = rows[None, :] > mine[:, None]
    is_longer |= is_before & (rows[None, :] == mine[:, None])
    to = segments + 3 * tl.sum((is_longer & (es < E)[None, :]).to(tl.int32), 1)
    begin = tl.sum(tl.where(is_before, rows[None, :], 0), 1)
    tl.store(to, index, mask=index < E)
    tl.store(to + 1, begin, mask=index < E)
    tl.store(to + 2, begin + mine, mask=index < E)


@triton.jit
def _up(
    x,
    token_ids,
    matrix,
    bias,
    matrix3,
    seed,
    h,
    h3,
    active,
    tiles,
    num_tiles,
    D,
    F,
    stride_x,
    dropout,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    DROPS: tl.constexpr,
    KEEPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """h = x[token_ids] W^T + bias and active = dropout(f(h)), [N, F]; with IS_GATED also
    h3 = x[token_ids] W3^T, and active = dropout(f(h) h3). Without KEEPS only active."""
    tile, block = place(tl.program_id(0), num_tiles, tl.cdiv(F, BN), GROUP)
    expert, begin, rows, is_row = tile_of(tiles, tile, ROWS)
    if expert >= E:
        return
    cols = block * BN + tl.arange(0, BN)
    is_col = cols < F
    ks = tl.arange(0, BK)
    ids = tokens_of(token_ids, begin + rows, is_row, HAS_IDS)
    xs = x + ids[:, None] * stride_x + ks[None, :]
    matrix += expert.to(tl.int64) * F * D
    matrix3 += expert.to(tl.int64) * F * D
    to_w = cols[None, :] * D + ks[:, None]
    total = tl.zeros([ROWS, BN], tl.float32)
    if IS_GATED:
        total3 = tl.zeros([ROWS, BN], tl.float32)
    for k in range(0, D, BK):
        inside = ks + k < D
        is_w = inside[:, None] & is_col[None, :]
        x_tile = tl.load(xs + k, mask=is_row[:, None] & inside[None, :], other=0.0)
        w_tile = tl.load(matrix + to_w + k, mask=is_w, other=0.0)
        x_tile = x_tile.to(w_tile.dtype)
        total = dot(x_tile, w_tile, total, PRECISION)
        if IS_GATED:
            w_tile = tl.load(matrix3 + to_w + k, mask=is_w, other=0.0)
            total3 = dot(x_tile, w_tile, total3, PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + expert * F + cols, mask=is_col, other=0.0).to(tl.float32)[None, :]
    offsets = rows[:, None] * F + cols[None, :]
    is_in = is_row[:, None] & is_col[None, :]
    rounded = total.to(h.dtype.element_ty)
    value = activate(rounded.to(tl.float32), KIND)
    if KEEPS:
        tl.store(h + begin * F + offsets, rounded, mask=is_in)
    if IS_GATED:
        rounded = total3.to(h.dtype.element_ty)
        if KEEPS:
            tl.store(h3 + begin * F + offsets, rounded, mask=is_in)
        value *= rounded.to(tl.float32)
    if DROPS:
        value = drop(value, seed, begin * F + offsets, dropout)
    tl.store(active + begin * F + offsets, value.to(active.dtype.element_ty), mask=is_in)


up = _tuned(ONE_PRODUCT, "ROWS")(_up)
gated_up = _tuned(TWO_PRODUCTS, "ROWS")(_up)


@_tuned(ONE_PRODUCT, "ROWS", "IS_SUM")
@triton.jit
def down(
    rows_of,
    matrix,
    rows3_of,
    matrix3,
    bias,
    weights,
    out,
    tiles,
    num_tiles,
    D,
    F,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    IS_SUM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out = weights (rows W + bias), [N, D]; with IS_SUM also + rows3 W3."""
    tile, block = place(tl.program_id(0), num_tiles, tl.cdiv(D, BN), GROUP)
    expert, begin, rows, is_row = tile_of(tiles, tile, ROWS)
    if expert >= E:
        return
    cols = block * BN + tl.arange(0, BN)
    is_col = cols < D
    ks = tl.arange(0, BK)
    to_rows = rows[:, None] * F + ks[None, :]
    rows_of += begin * F
    rows3_of += begin * F
    matrix += expert.to(tl.int64) * F * D
    matrix3 += expert.to(tl.int64) * F * D
    total = tl.zeros([ROWS, BN], tl.float32)
    for k in range(0, F, BK):
        inside = ks + k < F
        is_a, is_w = is_row[:, None] & inside[None, :], inside[:, None] & is_col[None, :]
        to_w = (ks + k)[:, None] * D + cols[None, :]
        a_tile = tl.load(rows_of + to_rows + k, mask=is_a, other=0.0)
        total = dot(a_tile, tl.load(matrix + to_w, mask=is_w, other=0.0), total, PRECISION)
    if IS_SUM:
        for k in range(0, F, BK):
            inside = ks + k < F
            is_a, is_w = is_row[:, None] & inside[None, :], inside[:, None] & is_col[None, :]
            to_w = (ks + k)[:, None] * D + cols[None, :]
            a_tile = tl.load(rows3_of + to_rows + k, mask=is_a, other=0.0)
            total = dot(a_tile, tl.load(matrix3 + to_w, mask=is_w, other=0.0), total, PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + expert * D + cols, mask=is_col, other=0.0).to(tl.float32)[None, :]
    if HAS_WEIGHTS:
        total *= tl.load(weights + begin + rows, mask=is_row, other=0.0).to(tl.float32)[:, None]
    to = out + begin * D + (rows[:, None] * D + cols[None, :])
    tl.store(to, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_col[None, :])


@_tuned(BACKWARD, "ROWS", "IS_GATED")
@triton.jit
def down_backward(
    grad,
    token_ids,
    weights,
    matrix,
    seed,
    h,
    h3,
    active,
    grad_h,
    grad_h3,
    dots,
    bias_sums,
    tiles,
    num_tiles,
    N,
    D,
    F,
    stride_grad,
    dropout,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    DROPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """From g = grad[token_ids] W2^T, which stays in registers, and the hidden rows:

    active = weights a, for the gradient of W2; grad_h and grad_h3, weighted, [N, F]; dots
    [F / BN, N], parts of <a, g>, the gradient of the weights; with HAS_BIAS bias_sums
    [num_tiles, F], the sums of grad_h over a tile's rows. a: the hidden rows after f and dropout.
    """
    tile, block = place(tl.program_id(0), num_tiles, tl.cdiv(F, BN), GROUP)
    expert, begin, rows, is_row = tile_of(tiles, tile, ROWS)
    if expert >= E:
        return
    cols = block * BN + tl.arange(0, BN)
    is_col = cols < F
    ks = tl.arange(0, BK)
    ids = tokens_of(token_ids, begin + rows, is_row, HAS_IDS)
    gs = grad + ids[:, None] * stride_grad + ks[None, :]
    ws = matrix + expert.to(tl.int64) * F * D + (cols[None, :] * D + ks[:, None])
    g = tl.zeros([ROWS, BN], tl.float32)
    for k in range(0, D, BK):
        inside = ks + k < D
        g_tile = tl.load(gs + k, mask=is_row[:, None] & inside[None, :], other=0.0)
        w_tile = tl.load(ws + k, mask=inside[:, None] & is_col[None, :], other=0.0)
        g = dot(g_tile.to(w_tile.dtype), w_tile, g, PRECISION)

    offsets = rows[:, None] * F + cols[None, :]
    is_in = is_row[:, None] & is_col[None, :]
    if DROPS:
        g = drop(g, seed, begin * F + offsets, dropout)
    hidden = tl.load(h + begin * F + offsets, mask=is_in, other=0.0).to(tl.float32)
    value = activate(hidden, KIND)
    slope = derive(hidden, KIND)
    if IS_GATED:
        linear = tl.load(h3 + begin * F + offsets, mask=is_in, other=0.0).to(tl.float32)
        product = value * linear
    else:
        product = value
    if HAS_WEIGHTS:
        parts = dots + block.to(tl.int64) * N + begin + rows
        tl.store(parts, tl.sum(product * g, 1), mask=is_row)
        weight = tl.load(weights + begin + rows, mask=is_row, other=0.0).to(tl.float32)[:, None]
        product *= weight
        g *= weight
    if DROPS:
        product = drop(product, seed, begin * F + offsets, dropout)
    tl.store(active + begin * F + offsets, product.to(active.dtype.element_ty), mask=is_in)
    if IS_GATED:
        grad_linear = (g * value).to(grad_h3.dtype.element_ty)
        tl.store(grad_h3 + begin * F + offsets, grad_linear, mask=is_in)
        g *= linear
    g *= slope
    tl.store(grad_h + begin * F + offsets, g.to(grad_h.dtype.element_ty), mask=is_in)
    if HAS_BIAS:
        tl.store(bias_sums + tile.to(tl.int64) * F + cols, tl.sum(g, 0), mask=is_col)


@triton.jit
def output_bias_backward(
    grad,
    token_ids,
    weights,
    bias,
    dots,
    bias_sums,
    tiles,
    D,
    stride_grad,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BN: tl.constexpr,
):
    """dots = <grad[token_ids], bias>, [N], and bias_sums [num_tiles, D], the sums of
    weights grad[token_ids] over a tile's rows."""
    tile = tl.program_id(0)
    expert, begin, rows, is_row = tile_of(tiles, tile, ROWS)
    if expert >= E:
        return
    ids = tokens_of(token_ids, begin + rows, is_row, HAS_IDS)
    if HAS_WEIGHTS:
        weight = tl.load(weights + begin + rows, mask=is_row, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, D, BN):
        cols = first + tl.arange(0, BN)
        is_col = cols < D
        is_in = is_row[:, None] & is_col[None, :]
        g = tl.load(grad + ids[:, None] * stride_grad + cols[None, :], mask=is_in, other=0.0)
        g = g.to(tl.float32)
        if HAS_WEIGHTS:
            b = tl.load(bias + expert * D + cols, mask=is_col, other=0.0).to(tl.float32)
            total += tl.sum(g * b[None, :], 1)
            g *= weight
        tl.store(bias_sums + tile.to(tl.int64) * D + cols, tl.sum(g, 0), mask=is_col)
    if HAS_WEIGHTS:
        tl.store(dots + begin + rows, total, mask=is_row)


@triton.jit
def sum_tiles(parts, tile_starts, out, width, scale, SKIPS_EMPTY: tl.constexpr, BN: tl.constexpr):
    """out [E, width] = scale times the sum of an expert's rows of parts [num_tiles, width]; of an
    expert without any 0, or with SKIPS_EMPTY as before."""
    expert = tl.program_id(0)
    first, stop = tl.load(tile_starts + expert), tl.load(tile_starts + expert + 1)
    if SKIPS_EMPTY & (first == stop):
        return
    cols = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    is_col = cols < width
    total, zero = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.int64)
    for tile in range(first, stop):
        total += tl.load(parts + (tile + zero) * width + cols, mask=is_col, other=0.0)
    to = out + expert.to(tl.int64) * width + cols
    tl.store(to, (total * scale).to(out.dtype.element_ty), mask=is_col)


@_tuned(WEIGHT_GRADIENT)
@triton.jit
def weight_gradient(
    rows_of,
    x,
    token_ids,
    out,
    parts,
    table,
    num_pieces,
    most,
    D,
    F,
    stride_x,
    scale,
    E: tl.constexpr,
    HAS_IDS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out [E, F, D] = scale rows^T x[token_ids] over each expert's rows.

    The table has `num_pieces` pieces of the experts with more than `most` rows, whose sums go to
    parts [num_pieces, F, D], then all experts, the longest first, so that they start first.
    """
    blocks = tl.cdiv(F, BM) * tl.cdiv(D, BN)
    item, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert = tl.load(table + 3 * item)
    if expert >= E:
        return
    begin, end = tl.load(table + 3 * item + 1), tl.load(table + 3 * item + 2)
    if (item >= num_pieces) & (end - begin > most):
        return
    fs = block // tl.cdiv(D, BN) * BM + tl.arange(0, BM)
    ds = block % tl.cdiv(D, BN) * BN + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)
    for first in range(begin, end, BK):
        rows = first + tl.arange(0, BK)
        is_row = rows < end
        ids = rows.to(tl.int64)
        to_rows = ids[None, :] * F + fs[:, None]
        if HAS_IDS:
            ids = tl.load(token_ids + rows, mask=is_row, other=0)
        a_tile = tl.load(rows_of + to_rows, mask=is_row[None, :] & (fs < F)[:, None], other=0.0)
        to_x = ids[:, None] * stride_x + ds[None, :]
        x_tile = tl.load(x + to_x, mask=is_row[:, None] & (ds < D)[None, :], other=0.0)
        total = dot(a_tile, x_tile.to(a_tile.dtype), total, PRECISION)
    to = fs[:, None] * D + ds[None, :]
    is_in = (fs < F)[:, None] & (ds < D)[None, :]
    if item < num_pieces:
        tl.store(parts + item.to(tl.int64) * F * D + to, total, mask=is_in)
    else:
        scaled = (total * scale).to(out.dtype.element_ty)
        tl.store(out + expert.to(tl.int64) * F * D + to, scaled, mask=is_in)
