"""Grouped matrix product: row segments, each times its own expert's weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _GroupedLinear(torch.autograd.Function):
    """Products straight into segments of one buffer, weight gradients into one stacked buffer.

    Autograd on single experts' slices would allocate a gradient of the whole stack for each.
    """

    @staticmethod
    def forward(ctx, rows_NI, weight_EIO, bias_EO, counts, grad_scale):
        ctx.counts, ctx.grad_scale = counts, grad_scale
        ctx.has_bias = bias_EO is not None
        ctx.save_for_backward(rows_NI, weight_EIO)
        out_NO = rows_NI.new_empty(rows_NI.size(0), weight_EIO.size(2))
        segments = zip(rows_NI.split(counts), out_NO.split(counts), strict=True)
        for e, (rows, out) in enumerate(segments):
            if not rows.size(0):
                continue
            if bias_EO is None:
                torch.mm(rows, weight_EIO[e], out=out)
            else:
                torch.addmm(bias_EO[e], rows, weight_EIO[e], out=out)
        return out_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NO):
        rows_NI, weight_EIO = ctx.saved_tensors
        need_rows, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad_NO = grad_NO.contiguous()
        grad_rows = torch.empty_like(rows_NI) if need_rows else None
        # Keeps the strides of a transposed weight: no copy when autograd transposes it back.
        grad_weight = torch.empty_like(weight_EIO) if need_weight else None
        grad_bias = grad_NO.new_zeros(weight_EIO.size(0), grad_NO.size(1)) if need_bias else None
        start = 0
        for e, count in enumerate(ctx.counts):
            rows, grad = rows_NI[start : start + count], grad_NO[start : start + count]
            if need_rows and count:
                torch.mm(grad, weight_EIO[e].t(), out=grad_rows[start : start + count])
            if need_weight and count:
                torch.addmm(grad_weight[e], rows.t(), grad, beta=0, alpha=ctx.grad_scale,
                            out=grad_weight[e])
            elif need_weight:
                grad_weight[e].zero_()
            if need_bias and count:
                torch.sum(grad, 0, out=grad_bias[e])
            start += count
        if need_bias and ctx.grad_scale != 1:
            grad_bias *= ctx.grad_scale
        return grad_rows, grad_weight, grad_bias, None, None


def grouped_linear(
    rows_NI: Tensor,
    weight_EIO: Tensor,
    bias_EO: Tensor | None,
    counts: Sequence[int],
    grad_scale: float = 1.0,
) -> Tensor:
    """Multiply each expert's segment of rows by its weight.

    Args:
        rows_NI: rows sorted by expert.
        weight_EIO: one [I, O] matrix per expert, of any strides (a transposed view is as good).
        bias_EO: added to each row, or None.
        counts: rows of each expert, in order; they sum to N.
        grad_scale: the gradients of weight and bias are multiplied by this.
    Returns:
        [N, O]. First derivatives only.
    """
    return _GroupedLinear.apply(rows_NI, weight_EIO, bias_EO, list(counts), grad_scale)
