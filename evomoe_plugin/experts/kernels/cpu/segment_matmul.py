"""Matmuls of each expert's rows with its own matrix, chunk by chunk, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evomoe_plugin.experts.kernels.cpu.chunks import Chunk
from evomoe_plugin.experts.kernels.cpu.memory_pool import POOL


class Matrices:
    """A stack of matrices or biases, as matmul operands.

    Args:
        stack: [E, F, D], or biases [E, any].
        rounded: dtype that the values are rounded to.
        dtype: dtype of the matmuls.
    """

    def __init__(self, stack: Tensor, rounded: torch.dtype, dtype: torch.dtype):
        self._each, self._rounded, self._dtype = stack.detach().unbind(), rounded, dtype
        self._is_ready = stack.dtype == rounded == dtype

    def of(self, chunk: Chunk) -> list[Tensor]:
        """The matrices of the chunk's experts."""
        matrices = [self._each[e] for e in chunk.experts]
        if self._is_ready:
            return matrices
        return [matrix.to(self._rounded).to(self._dtype) for matrix in matrices]

    def transposed(self, chunk: Chunk) -> list[Tensor]:
        """The same, transposed."""
        return [matrix.t() for matrix in self.of(chunk)]


class Gradient:
    """The gradient of a stack of matrices or biases.

    Args:
        stack: the matrices or biases.
        counts: rows of each expert, over all chunks.
        scale: factor of the gradient.
    """

    def __init__(self, stack: Tensor, counts: Sequence[int], scale: float):
        self._grad = POOL.empty(stack.shape, stack.dtype, stack.device)
        self._each = self._grad.unbind()
        self._counts, self._scale = counts, scale

    def add_matmul(self, chunk: Chunk, a: Tensor, b: Tensor) -> None:
        """Add a^T b of each expert's rows to its gradient."""
        parts = zip(
            chunk.experts,
            chunk.is_first,
            a[: chunk.size].t().split(chunk.sizes, 1),
            b.split(chunk.sizes),
            strict=True,
        )
        for expert, is_first, columns, others in parts:
            to = self._each[expert]
            if to.dtype == others.dtype:
                torch.addmm(to, columns, others, beta=not is_first, alpha=self._scale, out=to)
            else:
                self._add(to, is_first, columns @ others)

    def add_sums(self, chunk: Chunk, a: Tensor) -> None:
        """Add the sum of each expert's rows to its gradient."""
        parts = zip(chunk.experts, chunk.is_first, a[: chunk.size].split(chunk.sizes), strict=True)
        for expert, is_first, rows in parts:
            to = self._each[expert]
            if is_first and self._scale == 1 and to.dtype == rows.dtype:
                torch.mv(rows.t(), rows.new_ones(len(rows)), out=to)
            else:
                self._add(to, is_first, rows.sum(0))

    def _add(self, to: Tensor, is_first: bool, addend: Tensor) -> None:
        if is_first:
            to.zero_()
        to.add_(addend, alpha=self._scale)

    def whole(self) -> Tensor:
        """The whole gradient, zeros for experts without rows."""
        for to, count in zip(self._each, self._counts, strict=True):
            if not count:
                to.zero_()
        self._each = ()  # autograd copies a gradient that anything else refers to
        return self._grad


def multiply(
    chunk: Chunk,
    rows: Tensor,
    matrices: Sequence[Tensor],
    out: Tensor,
    bias: Matrices | None = None,
    adds: bool = False,
) -> None:
    """Write (or, with `adds`, add) each expert's rows times its matrix, plus bias, to `out`."""
    outs = out[: chunk.size].split(chunk.sizes)
    addends = bias.of(chunk) if bias is not None else outs if adds else [None] * len(outs)
    for part, matrix, to, addend in zip(
        rows[: chunk.size].split(chunk.sizes), matrices, outs, addends, strict=True
    ):
        if addend is None:
            torch.mm(part, matrix, out=to)
        else:
            torch.addmm(addend, part, matrix, out=to)
