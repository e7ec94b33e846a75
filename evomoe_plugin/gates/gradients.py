"""Gradients of zero for parameters that had no part in the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _AttachZeroGrads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, *parameters):
        # Not the parameters themselves: FSDP frees them between the passes.
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, *(torch.zeros(shape, dtype=dtype, device=device)
                       for shape, dtype, device in ctx.like)


def attach_zero_grads(y: Tensor, module: nn.Module) -> Tensor:
    """`y`, through which the parameters of `module` get gradients of zero instead of none.

    Data-parallel processes wait for a gradient of every parameter, and sum the same ones whether
    the module, or a part of it, worked or not; optimizers hold the same state. What other paths
    bring is added.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    return _AttachZeroGrads.apply(y, *parameters) if parameters else y
