"""Activation functions of hidden rows, and their derivatives, into given buffers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROWS = 64
"""Rows are computed in multiples of this, so that buffers need so much room behind them."""
_BLOCK = 1024
"""On CPUs oneDNN compiles and keeps a kernel for each shape it meets, and routing makes new ones in
every step. In blocks of these rows, and a last one of a multiple of `ROWS`, it meets few."""

aten = torch.ops.aten


def padded(rows: int) -> int:
    """The multiple of `ROWS` that holds `rows`."""
    return -(-rows // ROWS) * ROWS


class Activation:
    """An elementwise function.

    All tensors are [rows, F] with a multiple of `ROWS` rows; the caller ignores what it gets for
    rows that it has not filled.
    """

    function: Callable[[Tensor], Tensor]
    """It, on tensors of any shape."""

    def forward(self, x: Tensor, out: Tensor) -> None:
        """out = f(x)."""
        for rows in _blocks(x):
            self._forward(x[rows], out[rows])

    def backward(self, grad: Tensor, x: Tensor) -> None:
        """grad *= f'(x)."""
        for rows in _blocks(x):
            self._backward(grad[rows], x[rows])

    def _forward(self, x: Tensor, out: Tensor) -> None:
        raise NotImplementedError

    def _backward(self, grad: Tensor, x: Tensor) -> None:
        raise NotImplementedError


class _Gelu(Activation):
    """Exact GELU (Hendrycks and Gimpel, arXiv 1606.08415)."""

    function = staticmethod(torch.nn.functional.gelu)

    def _forward(self, x, out):
        aten.gelu.out(x, out=out)

    def _backward(self, grad, x):
        aten.gelu_backward.grad_input(grad, x, grad_input=grad)


class _Relu(Activation):
    function = staticmethod(torch.nn.functional.relu)

    def _forward(self, x, out):
        torch.clamp_min(x, 0, out=out)

    def _backward(self, grad, x):
        aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)


class _Silu(Activation):
    function = staticmethod(torch.nn.functional.silu)

    def _forward(self, x, out):
        aten.silu.out(x, out=out)

    def _backward(self, grad, x):
        aten.silu_backward.grad_input(grad, x, grad_input=grad)


class _Other(Activation):
    """Any elementwise function, differentiated by autograd."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function

    def _forward(self, x, out):
        out.copy_(self.function(x))

    def _backward(self, grad, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = self.function(x)
        grad.copy_(torch.autograd.grad(y, x, grad)[0])


def _blocks(x: Tensor) -> list[slice]:
    step = _BLOCK if x.device.type == "cpu" else max(x.size(0), 1)
    return [slice(i, i + step) for i in range(0, x.size(0), step)]


_KNOWN = {known.function: known for known in (_Gelu(), _Relu(), _Silu())}


def find_activation(function: Callable[[Tensor], Tensor]) -> Activation:
    """How to compute `function`."""
    return _KNOWN.get(function) or _Other(function)
