"""The k best candidates of each token in Triton, as a mask."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from evomoe_plugin.routing.kernels.operators import operator
from evomoe_plugin.routing.kernels.tiles import Tiles


@triton.jit
def _best(
    scores,
    out,
    T,
    C,
    stride_t,
    stride_c,
    rows_of_program,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    columns = tl.arange(0, WIDTH)
    first = tl.program_id(0) * rows_of_program
    least = tl.full([1, 1], -(2**63), tl.int64)
    for start in range(first, first + rows_of_program, ROWS):
        tokens = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (tokens < T)[:, None] & (columns < C)[None, :]
        at = tokens[:, None] * stride_t + columns.to(tl.int64)[None, :] * stride_c
        score = tl.load(scores + at, mask=inside, other=0.0).to(tl.float64)
        # Integers in the same order, by which NaN is the largest, and 0 and -0 are equal.
        bits = (score + 0.0).to(tl.int64, bitcast=True)
        left = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
        left = tl.where(score != score, 0x7FFFFFFFFFFFFFFF, left)
        left = tl.where(inside, left, least)
        chosen = tl.zeros([ROWS, WIDTH], tl.int1)
        for _ in range(K):
            is_next = columns[None, :] == tl.argmax(left, 1)[:, None]
            chosen |= is_next
            left = tl.where(is_next, least, left)
        tl.store(out + tokens[:, None] * C + columns[None, :], chosen.to(tl.int8), mask=inside)


@operator(lambda scores_TC, k: scores_TC.new_empty(scores_TC.shape, dtype=torch.bool))
def best_mask(scores_TC: Tensor, k: int) -> Tensor:
    """bool [T, C]: the k largest of each row (all, if there are fewer); the first on ties; NaN is
    the largest."""
    (T, C), tiles = scores_TC.shape, Tiles.of(*scores_TC.shape)
    out = torch.empty(T, C, dtype=torch.bool, device=scores_TC.device)
    _best[(tiles.programs,)](
        scores_TC,
        out.view(torch.int8),
        T,
        C,
        *scores_TC.stride(),
        tiles.rows_of_program,
        K=k,
        ROWS=tiles.rows,
        WIDTH=tiles.width,
    )
    return out
