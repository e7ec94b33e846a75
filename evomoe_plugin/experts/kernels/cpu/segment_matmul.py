"""Products of each expert's rows with its own matrix, chunk by chunk, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from evomoe_plugin.experts.kernels.cpu.chunks import Chunk
from evomoe_plugin.experts.kernels.cpu.memory_pool import POOL


class Matrices:
    """A stack of matrices or biases, to compute with.

    Args:
        stack: [E, F, D], or biases [E, any].
        rounded: precision that their values have in products.
        dtype: precision of the products.
    """

    def __init__(self, stack: Tensor, rounded: torch.dtype, dtype: torch.dtype):
        self._stack, self._rounded, self._dtype = stack, rounded, dtype
        self._is_ready = stack.dtype == rounded == dtype

    def of(self, chunk: Chunk) -> list[Tensor]:
        """Those of the chunk's experts."""
        if self._is_ready:
            return [self._all[e] for e in chunk.experts]
        return [self._stack[e].to(self._rounded).to(self._dtype) for e in chunk.experts]

    def transposed(self, chunk: Chunk) -> list[Tensor]:
        """The same, transposed."""
        if self._is_ready:
            return [self._all_transposed[e] for e in chunk.experts]
        return [matrix.t() for matrix in self.of(chunk)]

    @cached_property
    def _all(self) -> tuple[Tensor, ...]:
        return self._stack.detach().unbind()

    @cached_property
    def _all_transposed(self) -> tuple[Tensor, ...]:
        return self._stack.detach().transpose(1, 2).unbind()


class Gradient:
    """The gradient of a stack of matrices or biases.

    Args:
        stack: what it is of.
        counts: rows of each expert, over all chunks.
        scale: it is multiplied by this.
    """

    def __init__(self, stack: Tensor, counts: Sequence[int], scale: float):
        self._grad = POOL.empty(stack.shape, stack.dtype, stack.device)
        self._each = self._grad.unbind()
        self._counts, self._scale = counts, scale

    def add_matmul(self, chunk: Chunk, a: Tensor, b: Tensor) -> None:
        """Add to each expert's the product of its rows of a, transposed, and of b."""
        parts = zip(chunk.experts, chunk.is_first, a[: chunk.size].t().split(chunk.sizes, 1),
                    b.split(chunk.sizes), strict=True)
        for expert, is_first, columns, others in parts:
            to = self._each[expert]
            if to.dtype == others.dtype:
                torch.addmm(to, columns, others, beta=not is_first, alpha=self._scale, out=to)
            else:
                self._add(to, is_first, columns @ others)

    def add_sums(self, chunk: Chunk, a: Tensor) -> None:
        """Add to each expert's the sum of its rows."""
        parts = zip(chunk.experts, chunk.is_first, a[: chunk.size].split(chunk.sizes), strict=True)
        for expert, is_first, rows in parts:
            to = self._each[expert]
            if is_first and self._scale == 1 and to.dtype == rows.dtype:
                torch.sum(rows, 0, out=to)
            else:
                self._add(to, is_first, rows.sum(0))

    def _add(self, to: Tensor, is_first: bool, addend: Tensor) -> None:
        if is_first:
            to.zero_()
        to.add_(addend, alpha=self._scale)

    def whole(self) -> Tensor:
        """All of it, zeros for experts without rows."""
        for to, count in zip(self._each, self._counts, strict=True):
            if not count:
                to.zero_()
        self._each = ()  # what else holds the gradient keeps it from becoming a parameter's own
        return self._grad


def multiply(
    chunk: Chunk, rows: Tensor, matrices: Sequence[Tensor], out: Tensor,
    bias: Matrices | None = None, adds: bool = False,
) -> None:
    """Each expert's rows times its matrix, into (or, with `adds`, onto) `out`."""
    parts = zip(rows[: chunk.size].split(chunk.sizes), matrices,
                out[: chunk.size].split(chunk.sizes), strict=True)
    if bias is not None:
        for (part, matrix, to), added in zip(parts, bias.of(chunk), strict=True):
            torch.addmm(added, part, matrix, out=to)
        return
    for part, matrix, to in parts:
        if adds:
            torch.addmm(to, part, matrix, out=to)
        else:
            torch.mm(part, matrix, out=to)
