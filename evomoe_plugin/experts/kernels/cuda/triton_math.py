"""What the Triton kernels share: activations, products, dropout, a program's place and rows."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter keeps bf16 as integers and multiplies those; products of halves are exact in fp32.
_WIDENS = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total, precision: tl.constexpr):
    """total + a b, in fp32."""
    if _WIDENS:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=precision)


@triton.jit
def activate(h, kind: tl.constexpr):
    """f(h), by `Activation.kernel`. NaN stays NaN."""
    if kind == "relu":
        h = tl.where(h <= 0, 0.0, h)
    elif kind == "relu_squared":
        h = tl.where(h <= 0, 0.0, h * h)
    elif kind == "silu":
        h = h * tl.sigmoid(h)
    elif kind == "tanh":
        h = 2.0 * tl.sigmoid(2.0 * h) - 1.0
    elif kind == "gelu":
        h = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif kind == "gelu_tanh":
        h = h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    return h


@triton.jit
def derive(h, kind: tl.constexpr):
    """f'(h)."""
    slope = tl.where(h <= 0, 0.0, 1.0)
    if kind == "relu_squared":
        slope = tl.where(h <= 0, 0.0, 2.0 * h)
    elif kind == "silu":
        s = tl.sigmoid(h)
        slope = s * (1.0 + h * (1.0 - s))
    elif kind == "tanh":
        s = tl.sigmoid(2.0 * h)
        slope = 4.0 * s * (1.0 - s)
    elif kind == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * h * h)
        slope = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * density
    elif kind == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
        slope = s + h * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * h * h)
    return slope


@triton.jit
def drop(values, seed, offsets, probability):
    """Dropout of `values`; the same seed and int64 offsets drop the same."""
    kept = tl.rand(tl.load(seed), offsets) >= probability
    return tl.where(kept, values / (1.0 - probability), 0.0)


@triton.jit
def place(index, tiles, blocks, GROUP: tl.constexpr):
    """Tile and block of a program. Programs near in time share operands, which stay in the cache:
    GROUP tiles of rows go through all blocks of columns together."""
    first = index // (GROUP * blocks) * GROUP
    height = tl.minimum(tiles - first, GROUP)
    inside = index % (GROUP * blocks)
    return first + inside % height, inside // height


@triton.jit
def tile_of(tiles, tile, ROWS: tl.constexpr):
    """Expert of a tile, its first row (int64), ROWS offsets from there, and which it has."""
    begin = tl.load(tiles + 3 * tile + 1).to(tl.int64)
    rows = tl.arange(0, ROWS)
    is_row = rows < tl.load(tiles + 3 * tile + 2) - begin
    return tl.load(tiles + 3 * tile), begin, rows, is_row


@triton.jit
def tokens_of(token_ids, rows, is_row, HAS_IDS: tl.constexpr):
    """The token of each row; without ids the row itself."""
    if HAS_IDS:
        rows = tl.load(token_ids + rows, mask=is_row, other=0)
    return rows
