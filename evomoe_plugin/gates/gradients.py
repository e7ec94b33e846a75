"""Zero gradients for parameters that the forward pass did not use."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _AttachZeroGrads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, *parameters):
        # Not the parameters themselves, which FSDP frees between the passes.
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, *(
            torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like
        )


def attach_zero_grads(y: Tensor, module: nn.Module) -> Tensor:
    """Return `y` such that its backward pass gives the parameters of `module` gradients of zero.

    Data-parallel ranks wait for a gradient of every parameter, whether or not the module was used,
    and optimizers hold state for all of them. Gradients from other paths are added.
    """
    found = [
        tensor
        for part in module.modules()
        # FSDP puts views of its flat parameter in place of parameters.
        for tensor in (*part._parameters.values(), *vars(part).values())
        if isinstance(tensor, Tensor) and tensor.requires_grad
        if tensor.is_leaf or tensor._is_view()
    ]
    parameters = {id(tensor): tensor for tensor in found}.values()
    return _AttachZeroGrads.apply(y, *parameters) if parameters else y
