"""The sums over tokens of `routing.stats.routing_stats` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from evomoe_plugin.routing.kernels.operators import operator
from evomoe_plugin.routing.kernels.tiles import Tiles

SCALARS = 6


@triton.jit
def _sum(
    mask,
    probs,
    checked,
    token_mask,
    out,
    T,
    C,
    E,
    stride_mask_t,
    stride_mask_c,
    stride_probs_t,
    stride_probs_c,
    stride_checked_t,
    stride_checked_c,
    tiny,
    rows_of_program,
    SCALARS: tl.constexpr,
    HAS_TOKEN_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out [programs, C + SCALARS], of each program's tokens (`sums`)."""
    columns = tl.arange(0, WIDTH)
    is_column = columns < C
    first = tl.program_id(0) * rows_of_program
    load = tl.zeros([WIDTH], tl.int32)
    tokens = tl.zeros([ROWS], tl.int32)
    bad = tl.zeros([ROWS], tl.int32)
    entropy = tl.zeros([ROWS], tl.float64)
    for start in range(first, first + rows_of_program, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        is_token = rows < T
        if HAS_TOKEN_MASK:
            is_token &= tl.load(token_mask + rows, mask=is_token, other=0) != 0
        inside = is_token[:, None] & is_column[None, :]
        rows, cols = rows[:, None], columns.to(tl.int64)[None, :]
        to_mask = mask + rows * stride_mask_t + cols * stride_mask_c
        to_probs = probs + rows * stride_probs_t + cols * stride_probs_c
        to_checked = checked + rows * stride_checked_t + cols * stride_checked_c
        load += tl.sum(tl.load(to_mask, mask=inside, other=0).to(tl.int32), 0)
        p = tl.load(to_probs, mask=inside, other=0.0)
        logs = tl.log(tl.where(p < tiny, tiny, p).to(p.dtype))
        entropy -= tl.sum(p * logs, 1).to(tl.float64)
        value = tl.load(to_checked, mask=inside, other=0.0)
        bad += tl.max((~(tl.abs(value) < float("inf"))).to(tl.int32), 1)
        tokens += is_token.to(tl.int32)
    out += tl.program_id(0) * (C + SCALARS)
    tl.store(out + columns, load.to(tl.float64), mask=is_column)
    count = tl.sum(tokens, 0).to(tl.float64)
    of_experts = tl.sum(tl.where(columns < E, load, 0), 0).to(tl.float64)
    of_null = tl.sum(tl.where(columns < E, 0, load), 0).to(tl.float64)
    tl.store(out + C, count)
    tl.store(out + C + 1, of_experts)
    tl.store(out + C + 2, of_null)
    tl.store(out + C + 3, count * E)
    tl.store(out + C + 4, tl.sum(entropy, 0))
    tl.store(out + C + 5, tl.sum(bad, 0).to(tl.float64))


def sums(
    mask_TC: Tensor,
    probs_TC: Tensor,
    checked_TC: Tensor,
    token_mask_T: Tensor | None,
    num_experts: int,
) -> tuple[Tensor, ...]:
    """Sums over tokens that are not padding, fp64.

    Args:
        mask_TC: bool, without padding.
        probs_TC: for the entropy.
        checked_TC: what may hold NaN/Inf.
        token_mask_T: bool, False for padding.
        num_experts: E, of the C candidates the first.
    Returns:
        the pairs of each candidate [C]; tokens, pairs of experts, pairs of null experts, E times
        the tokens, the entropy, and the tokens with NaN/Inf.
    """
    found = _of_programs(mask_TC, probs_TC, checked_TC, token_mask_T, num_experts).sum(0)
    C = mask_TC.size(1)
    return found[:C], *found[C:].unbind()


def _empty(mask_TC: Tensor, *_: object) -> Tensor:
    T, C = mask_TC.shape
    shape = Tiles.of(T, C).programs, C + SCALARS
    return mask_TC.new_empty(shape, dtype=torch.float64)


@operator(_empty)
def _of_programs(
    mask_TC: Tensor,
    probs_TC: Tensor,
    checked_TC: Tensor,
    token_mask_T: Tensor | None,
    num_experts: int,
) -> Tensor:
    (T, C), tiles = mask_TC.shape, Tiles.of(*mask_TC.shape)
    out = _empty(mask_TC)
    if probs_TC.element_size() < 4:  # Triton has no logarithm of half precision
        probs_TC = probs_TC.float()
    _sum[(tiles.programs,)](
        mask_TC.view(torch.uint8),
        probs_TC,
        checked_TC,
        mask_TC if token_mask_T is None else token_mask_T.contiguous().view(torch.uint8),
        out,
        T,
        C,
        num_experts,
        *mask_TC.stride(),
        *probs_TC.stride(),
        *checked_TC.stride(),
        torch.finfo(torch.float32).tiny,  # Triton takes numbers as fp32
        tiles.rows_of_program,
        SCALARS=SCALARS,
        HAS_TOKEN_MASK=token_mask_T is not None,
        ROWS=tiles.rows,
        WIDTH=tiles.width,
    )
    return out
