"""The gradient of a chunk's logits, written over them in one pass, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _differentiate(
    logits,
    targets,
    scales,
    smoothed,
    plain,
    V,
    smoothing,
    of_others,
    IS_SMOOTHED: tl.constexpr,
    IS_SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its losses, and the gradient of the smoothed one over its logits."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    columns = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    summed = tl.zeros([BLOCK], tl.float32)
    chosen = tl.zeros([BLOCK], tl.float32)
    target = tl.load(targets + row)
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        summed += tl.where(inside, x, 0.0)
        # Not loaded apart: another thread may have written its gradient there by then.
        chosen = tl.where(start + columns == target, x, chosen)
        before = largest
        largest = tl.maximum(before, x)
        finite = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp(before - finite) + tl.exp(x - finite)
    most = tl.max(largest, 0)
    # Apart from the largest: the sum of both would lose the digits of small losses.
    log_sum = tl.log(tl.sum(total * tl.exp(largest - most), 0))
    at_target = tl.sum(chosen, 0) - most - log_sum
    loss = -at_target
    tl.store(plain + row, loss)
    if IS_SMOOTHED:
        of_all = tl.sum(summed, 0) - V * most - V * log_sum
        loss = (1.0 - smoothing - of_others) * loss - of_others * of_all
    tl.store(smoothed + row, loss)
    # exp(x) - 1 near 0, where the difference of rounded numbers would be.
    small = at_target * (1.0 + at_target * (0.5 + at_target * (1.0 / 6 + at_target / 24)))
    gradient = tl.where(at_target > -0.05, small, tl.exp(at_target) - 1.0) + smoothing
    scale = 1.0
    if IS_SCALED:
        scale = tl.load(scales + row).to(tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        x = tl.load(logits + start + columns, mask=inside, other=0.0).to(tl.float32)
        g = tl.where(start + columns == target, gradient, tl.exp(x - most - log_sum) - of_others)
        tl.store(logits + start + columns, (scale * g).to(logits.dtype.element_ty), mask=inside)


def differentiate_(
    logits_NV: Tensor,
    targets_N: Tensor,
    smoothing: float,
    of_others: float,
    scales_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Put the gradient of the smoothed losses in the place of contiguous logits.

    Args:
        logits_NV: fp32 or half precision.
        targets_N: int64.
        smoothing: of the target's weight in the loss.
        of_others: the weight of every other entry.
        scales_N: factor of each row's gradient; None: 1.
    Returns:
        The losses, smoothed and not, fp32 [N] each.
    """
    N, V = logits_NV.shape
    losses = logits_NV.new_empty(2, N, dtype=torch.float32)
    if N:
        with torch.cuda.device_of(logits_NV):
            _differentiate[(N,)](
                logits_NV,
                targets_N.contiguous(),
                logits_NV if scales_N is None else scales_N.contiguous(),
                *losses,
                V,
                smoothing,
                of_others,
                smoothing > 0,
                scales_N is not None,
                min(_BLOCK, triton.next_power_of_2(V)),
                num_warps=8,
            )
    smoothed_N, plain_N = losses
    return smoothed_N, plain_N
