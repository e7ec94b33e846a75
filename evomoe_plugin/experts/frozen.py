"""Freeze single elements of a weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, frozen):
        ctx.save_for_backward(frozen)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (frozen,) = ctx.saved_tensors
        return grad.masked_fill(frozen, 0.0), None


def without_gradient(weight: Tensor, frozen: Tensor) -> Tensor:
    """`weight`, with zero gradient where `frozen` (bool, of its shape).

    A weight of zero then stays exactly zero under any optimizer whose moments of it are zero, since
    weight decay is a factor.
    """
    return _WithoutGradient.apply(weight, frozen)
