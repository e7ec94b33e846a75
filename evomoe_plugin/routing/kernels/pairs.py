"""The pairs of a routing plan in Triton: sorted by expert, and where each token's pairs are.

`_count` counts the pairs of each program's tokens by expert; `_write` adds up the counts of earlier
programs and of smaller experts, which gives every pair its place. Nothing is sorted, and nothing is
added by atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from evomoe_plugin.routing.kernels.operators import operator
from evomoe_plugin.routing.kernels.tiles import Tiles

_BLOCK = 512


@triton.jit
def _load(mask, tokens, experts, T, E, stride_t, stride_e):
    tokens, experts = tokens.to(tl.int64), experts.to(tl.int64)
    at = tokens[:, None] * stride_t + experts[None, :] * stride_e
    inside = (tokens < T)[:, None] & (experts < E)[None, :]
    return tl.load(mask + at, mask=inside, other=0).to(tl.int32)


@triton.jit
def _count(
    mask,
    counts,
    T,
    E,
    stride_t,
    stride_e,
    rows_of_program,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """counts [programs, E]: the pairs of each program's tokens."""
    experts = tl.arange(0, WIDTH)
    first = tl.program_id(0) * rows_of_program
    total = tl.zeros([WIDTH], tl.int32)
    for start in range(first, first + rows_of_program, ROWS):
        tokens = start + tl.arange(0, ROWS)
        total += tl.sum(_load(mask, tokens, experts, T, E, stride_t, stride_e), 0)
    tl.store(counts + tl.program_id(0) * E + experts, total, mask=experts < E)


@triton.jit
def _write(
    mask,
    weights,
    counts,
    token_ids,
    expert_ids,
    weights_of_pairs,
    tokens_per_expert,
    order,
    starts,
    places,
    T,
    E,
    N,
    programs,
    stride_t,
    stride_e,
    stride_weights_t,
    stride_weights_e,
    rows_of_program,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the plan (`Pairs`), and places [T, E]: the place of each pair, or -1."""
    program = tl.program_id(0)
    experts = tl.arange(0, WIDTH)
    earlier = tl.zeros([WIDTH], tl.int32)
    total = tl.zeros([WIDTH], tl.int32)
    for start in range(0, programs, ROWS):
        ids = start + tl.arange(0, ROWS)
        part = _load(counts, ids, experts, programs, E, E, 1)
        total += tl.sum(part, 0)
        earlier += tl.sum(tl.where((ids < program)[:, None], part, 0), 0)
    if program == 0:
        tl.store(tokens_per_expert + experts, total.to(tl.int64), mask=experts < E)
    following = tl.cumsum(total, 0) - total + earlier  # the place of an expert's next pair
    done = tl.sum(earlier, 0)
    first = program * rows_of_program
    for start in range(first, first + rows_of_program, ROWS):
        tokens = start + tl.arange(0, ROWS)
        chosen = _load(mask, tokens, experts, T, E, stride_t, stride_e)
        place = following[None, :] + tl.cumsum(chosen, 0) - chosen
        of_token = tl.sum(chosen, 1)
        begin = done + tl.cumsum(of_token, 0) - of_token
        by_token = begin[:, None] + tl.cumsum(chosen, 1) - chosen
        is_pair = (chosen != 0) & (place < N) & (by_token < N)
        wide = tokens.to(tl.int64)[:, None]
        tl.store(token_ids + place, wide + tl.zeros_like(place), mask=is_pair)
        tl.store(expert_ids + place, (experts[None, :] + 0 * place).to(tl.int64), mask=is_pair)
        at = wide * stride_weights_t + experts.to(tl.int64)[None, :] * stride_weights_e
        weight = tl.load(weights + at, mask=is_pair, other=0.0)
        tl.store(weights_of_pairs + place, weight, mask=is_pair)
        tl.store(order + by_token, place.to(tl.int64), mask=is_pair)
        inside = (tokens < T)[:, None] & (experts < E)[None, :]
        tl.store(places + wide * E + experts[None, :], tl.where(is_pair, place, -1), mask=inside)
        tl.store(starts + tokens, begin.to(tl.int64), mask=tokens < T)
        following += tl.sum(chosen, 0)
        done += tl.sum(of_token, 0)
    if program == programs - 1:
        tl.store(starts + T, done.to(tl.int64))
    for start in range(tl.sum(total, 0) + program * BLOCK, N, programs * BLOCK):
        left = start + tl.arange(0, BLOCK)
        none = tl.full([BLOCK], -1, tl.int64)
        tl.store(token_ids + left, none, mask=left < N)
        tl.store(expert_ids + left, none, mask=left < N)
        tl.store(weights_of_pairs + left, tl.zeros([BLOCK], tl.float32), mask=left < N)


@triton.jit
def _spread(grad_of_pairs, places, out, size, BLOCK: tl.constexpr):
    """out [T, E]: the gradient of each pair, 0 where there is none."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places + index, mask=index < size, other=-1)
    grad = tl.load(grad_of_pairs + place, mask=place >= 0, other=0.0)
    tl.store(out + index, grad, mask=index < size)


class Pairs(NamedTuple):
    """The fields of a `RoutingPlan`; N places, the last ones of no pair: token and expert -1."""

    weights_N: Tensor
    token_ids_N: Tensor
    expert_ids_N: Tensor
    tokens_per_expert_E: Tensor
    order_N: Tensor
    """The places of pairs sorted by token; not written for places of no pair."""
    starts: Tensor
    """The first of each token's pairs in `order_N`, and the end, [T + 1]."""


def sorted_pairs(mask_TE: Tensor, weights_TE: Tensor, most_pairs: int | None) -> Pairs:
    """The pairs in `mask_TE`, with the gradient of their weights.

    Args:
        mask_TE: bool.
        weights_TE: combine weights.
        most_pairs: N; None: as many as there are, for which the host waits.
    """
    counts = _counts(mask_TE)
    N = int(counts.sum()) if most_pairs is None else most_pairs
    return Pairs(*_SortedPairs.apply(weights_TE, mask_TE, counts, N))


def _no_counts(mask_TE: Tensor) -> Tensor:
    T, E = mask_TE.shape
    return mask_TE.new_empty(Tiles.of(T, E).programs, E, dtype=torch.int32)


@operator(_no_counts)
def _counts(mask_TE: Tensor) -> Tensor:
    """The pairs of each expert in the tokens of each program, [programs, E]."""
    (T, E), tiles = mask_TE.shape, Tiles.of(*mask_TE.shape)
    out = _no_counts(mask_TE)
    _count[(tiles.programs,)](
        mask_TE.view(torch.uint8),
        out,
        T,
        E,
        *mask_TE.stride(),
        tiles.rows_of_program,
        ROWS=tiles.rows,
        WIDTH=tiles.width,
    )
    return out


def _no_pairs(weights_TE: Tensor, mask_TE: Tensor, counts: Tensor, N: int) -> list[Tensor]:
    T, E = mask_TE.shape
    ids = [mask_TE.new_empty(size, dtype=torch.int64) for size in (N, N, E, N, T + 1)]
    return [weights_TE.new_empty(N), *ids, mask_TE.new_empty(T, E, dtype=torch.int32)]


@operator(_no_pairs)
def _written(weights_TE: Tensor, mask_TE: Tensor, counts: Tensor, N: int) -> list[Tensor]:
    """`Pairs`, and the place of each pair or -1, [T, E]."""
    (T, E), tiles = mask_TE.shape, Tiles.of(*mask_TE.shape)
    out = _no_pairs(weights_TE, mask_TE, counts, N)
    pairs, places = Pairs(*out[:-1]), out[-1]
    _write[(tiles.programs,)](
        mask_TE.view(torch.uint8),
        weights_TE,
        counts,
        pairs.token_ids_N,
        pairs.expert_ids_N,
        pairs.weights_N,
        pairs.tokens_per_expert_E,
        pairs.order_N,
        pairs.starts,
        places,
        T,
        E,
        N,
        tiles.programs,
        *mask_TE.stride(),
        *weights_TE.stride(),
        tiles.rows_of_program,
        ROWS=tiles.rows,
        WIDTH=tiles.width,
        BLOCK=_BLOCK,
    )
    return out


@operator(lambda grad_N, places: grad_N.new_empty(places.shape))
def _spread_out(grad_N: Tensor, places: Tensor) -> Tensor:
    """The gradient of the weights, [T, E]."""
    out = grad_N.new_empty(places.shape)
    grid = (triton.cdiv(max(out.numel(), 1), _BLOCK),)
    _spread[grid](grad_N.contiguous(), places, out, out.numel(), _BLOCK)
    return out


class _SortedPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_TE: Tensor, mask_TE: Tensor, counts: Tensor, N: int):
        *pairs, places = _written(weights_TE, mask_TE, counts, N)
        ctx.save_for_backward(places)
        ctx.mark_non_differentiable(*pairs[1:])
        ctx.set_materialize_grads(False)  # of those zeros would be made
        return tuple(pairs)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_N: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, None, None, None]:
        (places,) = ctx.saved_tensors
        return None if grad_N is None else _spread_out(grad_N, places), None, None, None
