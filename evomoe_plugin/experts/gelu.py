"""GELU for rows whose number changes with every batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@contextmanager
def _without_onednn() -> Iterator[None]:
    """oneDNN compiles and keeps a kernel for each shape it meets, and routing makes a new shape in
    every step: hundreds of kernels scattered over the heap, which grew by gigabytes around them.
    """
    before = torch.backends.mkldnn.set_flags(False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(before[0])


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        with _without_onednn():
            return torch.nn.functional.gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with _without_onednn():
            return torch.ops.aten.gelu_backward(grad, x)


def gelu(x: Tensor) -> Tensor:
    """Exact GELU (Hendrycks and Gimpel, arXiv 1606.08415), computed in fp32 for half precision."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return gelu(x.float()).to(x.dtype)
    return _Gelu.apply(x) if x.device.type == "cpu" else torch.nn.functional.gelu(x)
