"""Weighted sum of each token's rows in Triton: in a fixed order, in fp32, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WIDTH = 1024


@triton.jit
def _kernel(
    rows, weights, order, starts, out, width, has_weights: tl.constexpr, block: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    total = tl.zeros([block], tl.float32)
    for i in range(tl.load(starts + token), tl.load(starts + token + 1)):
        n = tl.load(order + i)
        row = tl.load(rows + n * width + columns, mask=inside, other=0.0).to(tl.float32)
        if has_weights:
            row *= tl.load(weights + n).to(tl.float32)
        total += row
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=inside)


def sort_by_token(
    token_ids_N: Tensor | None, num_tokens: int
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Row indices sorted by token, int64 [N], and the start of each token's rows, [T + 1]; None
    without token ids."""
    if token_ids_N is None:
        return None, None
    sorted_N, order_N = token_ids_N.sort(stable=True)
    tokens = torch.arange(num_tokens + 1, device=token_ids_N.device)
    return order_N, torch.searchsorted(sorted_N, tokens)


def combine(
    rows_ND: Tensor, weights_N: Tensor | None, order_N: Tensor, starts: Tensor, dtype: torch.dtype
) -> Tensor:
    """Each token's rows, weighted and summed: [T, D]; zeros for a token without rows.

    Args:
        rows_ND: contiguous.
        weights_N: None: 1.
        order_N, starts: from `sort_by_token`, or `RoutingPlan.by_token`.
        dtype: of the result.
    """
    tokens, width = starts.numel() - 1, rows_ND.size(1)
    out = torch.empty(tokens, width, dtype=dtype, device=rows_ND.device)
    if tokens:
        block = min(_WIDTH, triton.next_power_of_2(width))
        with torch.cuda.device_of(rows_ND):
            _kernel[tokens, triton.cdiv(width, block)](
                rows_ND,
                rows_ND if weights_N is None else weights_N,
                order_N,
                starts,
                out,
                width,
                weights_N is not None,
                block,
            )
    return out
