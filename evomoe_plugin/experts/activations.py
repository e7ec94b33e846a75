"""Activation functions of hidden rows and their derivatives, into given buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 64
"""Rows are computed in multiples of this, so buffers are padded by up to so many rows."""
_BLOCK = 1024
"""oneDNN compiles and caches a CPU kernel for each shape, and routing makes new shapes in every
step. Blocks of so many rows, and a last one of a multiple of `ROWS`, keep the shapes few."""


def padded(rows: int) -> int:
    """`rows` rounded up to a multiple of `ROWS`."""
    return -(-rows // ROWS) * ROWS


@dataclass(frozen=True)
class Activation:
    """An elementwise function.

    All tensors are [rows, F] with a multiple of `ROWS` rows; outputs of padding are undefined.
    """

    function: Callable[[Tensor], Tensor]
    """f, on tensors of any shape."""
    into: Callable[[Tensor, Tensor], object]
    """Called with x and the tensor to write f(x) into."""
    derive: Callable[[Tensor, Tensor], object]
    """Called with the gradient of f(x), to be overwritten by that of x, and with x."""
    kernel: str | None = None
    """Its name in the Triton kernels (`kernels.cuda.triton_math`); None: they have it not."""

    def forward(self, x: Tensor, out: Tensor) -> None:
        """out = f(x)."""
        for rows in _blocks(x):
            self.into(x[rows], out[rows])

    def backward(self, grad: Tensor, x: Tensor) -> None:
        """grad *= f'(x)."""
        for rows in _blocks(x):
            self.derive(grad[rows], x[rows])


def _blocks(x: Tensor) -> list[slice]:
    step = _BLOCK if x.device.type == "cpu" else max(x.size(0), 1)
    return [slice(i, i + step) for i in range(0, x.size(0), step)]


def _by_autograd(function: Callable[[Tensor], Tensor]) -> Activation:
    def derive(grad: Tensor, x: Tensor) -> None:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = function(x)
        grad.copy_(torch.autograd.grad(y, x, grad)[0])

    return Activation(
        function, lambda x, out: out.copy_(function(x)), derive, _KERNELS.get(function)
    )


aten, F = torch.ops.aten, torch.nn.functional
_KNOWN: dict[Callable, tuple[Callable, Callable]] = {
    F.gelu: (  # exact (Hendrycks and Gimpel, arXiv 1606.08415)
        lambda x, out: aten.gelu.out(x, out=out),
        lambda grad, x: aten.gelu_backward.grad_input(grad, x, grad_input=grad),
    ),
    F.relu: (
        lambda x, out: torch.clamp_min(x, 0, out=out),
        lambda grad, x: aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad),
    ),
    F.silu: (
        lambda x, out: aten.silu.out(x, out=out),
        lambda grad, x: aten.silu_backward.grad_input(grad, x, grad_input=grad),
    ),
}
_KERNELS: dict[Callable, str] = {
    F.gelu: "gelu",
    F.relu: "relu",
    F.silu: "silu",
    torch.tanh: "tanh",
}


def name_kernel(function: Callable[[Tensor], Tensor], kernel: str) -> None:
    """State that the Triton kernels compute `function` under the name `kernel`."""
    _KERNELS[function] = kernel


def find_activation(function: Callable[[Tensor], Tensor]) -> Activation:
    """The `Activation` of `function`; an unknown one is differentiated by autograd."""
    if function in _KNOWN:
        return Activation(function, *_KNOWN[function], _KERNELS[function])
    return _by_autograd(function)
