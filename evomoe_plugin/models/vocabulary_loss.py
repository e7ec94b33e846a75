"""Cross-entropy over the vocabulary without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evomoe_plugin.experts.precision import native_matmul_dtype, operand_dtype

CHUNKS = {"cpu": 512, "cuda": 4096}
"""Tokens of a chunk, by measurement: on a CPU its logits stay near the processor, on a GPU products
of fewer rows are slower."""


def vocabulary_loss(
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    padding_idx: int,
    chunk: int | None = None,
    reduce: bool = True,
) -> Tensor:
    """Negative log-likelihood of the targets under softmax(x weight^T).

    Logits exist for one chunk of tokens at a time, and their gradient is computed while they do
    (Liger kernel, arXiv 2410.10989): memory is V * (chunk + D) instead of several times T * V.
    Products are in the precision of `x_TD`, or in that of autocast; softmax, losses and sums over
    chunks in fp32 (fp64 for fp64). In fp16, and per token, the gradient is computed in the backward
    pass from logits computed again: there the scale of the loss is known, without which fp16 would
    lose small gradients.

    Args:
        x_TD: features.
        weight_VD: output embeddings.
        targets_T: int64 symbols; where one is `padding_idx` the loss is 0, and nothing computed.
        chunk: tokens of a chunk; None: as measured for the device.
        reduce: give the sum.
    Returns:
        A scalar, or [T] without `reduce`.
    """
    device = x_TD.device.type
    dtype = operand_dtype(x_TD)
    kept_N = targets_T.ne(padding_idx).nonzero().squeeze(1)
    whole = len(kept_N) == len(targets_T)
    x_ND, targets_N = (x_TD, targets_T) if whole else (x_TD[kept_N], targets_T[kept_N])
    given = x_ND, weight_VD, targets_N, chunk or CHUNKS.get(device, CHUNKS["cuda"]), dtype
    learns = torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad)
    with torch.autocast(device, enabled=False):
        if reduce and learns and dtype != torch.float16:
            return _SummedLoss.apply(*given)
        losses_N = _TokenLosses.apply(*given) if learns else _Chunks(*given).losses()
    if reduce:
        return losses_N.sum()
    if whole:
        return losses_N
    return losses_N.new_zeros(len(targets_T)).index_copy(0, kept_N, losses_N)


class _Chunks:
    """What is computed of one chunk of tokens after another.

    Args:
        x_ND, weight_VD, targets_N: as `vocabulary_loss` takes them, without padding.
        size: tokens of a chunk.
        dtype: of products, or of their operands where those are best computed in fp32.
    """

    def __init__(self, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, size: int,
                 dtype: torch.dtype):
        computed = native_matmul_dtype(dtype, x_ND.device.type)
        self.x_ND, self.weight_VD = (given.to(dtype).to(computed) for given in (x_ND, weight_VD))
        self.targets_N1 = targets_N.unsqueeze(1)
        self._rounded = None if computed is dtype else dtype
        self.wide = torch.promote_types(x_ND.dtype, torch.float32)
        self._out_dtypes = x_ND.dtype, weight_VD.dtype
        self._size = size

    def log_probs(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, their log-probabilities [rows, V], and memory of the logits, to write into; the
        next chunk reuses both."""
        N, V = len(self.x_ND), len(self.weight_VD)
        buffer = self.x_ND.new_empty(min(self._size, N), V)
        for start in range(0, N, self._size):
            rows = slice(start, min(start + self._size, N))
            logits = torch.mm(self.x_ND[rows], self.weight_VD.t(), out=buffer[: rows.stop - start])
            if self._rounded is not None:
                logits.copy_(logits.to(self._rounded))
            if logits.dtype == self.wide:
                yield rows, torch.log_softmax(logits, 1, out=logits), logits
            else:
                yield rows, torch.log_softmax(logits, 1, dtype=self.wide), logits

    def losses(self) -> Tensor:
        """[N]."""
        losses_N = self.x_ND.new_empty(len(self.x_ND), dtype=self.wide)
        for rows, log_probs, _ in self.log_probs():
            losses_N[rows] = -log_probs.gather(1, self.targets_N1[rows]).squeeze(1)
        return losses_N

    def begin_gradients(self, of_x: bool, of_weight: bool) -> None:
        """Before `add_gradients`; only those that are asked for are computed."""
        self._dx_ND = torch.empty_like(self.x_ND, dtype=self._out_dtypes[0]) if of_x else None
        self._dweight_VD = (
            torch.zeros_like(self.weight_VD, dtype=self.wide) if of_weight else None)

    def add_gradients(self, rows: slice, dlogits: Tensor) -> None:
        """From the gradient of the logits of these rows."""
        if self._dx_ND is not None:
            self._dx_ND[rows] = dlogits @ self.weight_VD
        if self._dweight_VD is None:
            return
        if dlogits.dtype == self.wide:
            self._dweight_VD.addmm_(dlogits.t(), self.x_ND[rows])
        else:
            self._dweight_VD += dlogits.t() @ self.x_ND[rows]

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of features and weights."""
        dweight_VD = self._dweight_VD
        return self._dx_ND, None if dweight_VD is None else dweight_VD.to(self._out_dtypes[1])


class _SummedLoss(torch.autograd.Function):
    """The sum; the backward pass scales gradients that exist already."""

    @staticmethod
    def forward(ctx, x_ND, weight_VD, targets_N, size, dtype):
        chunks = _Chunks(x_ND, weight_VD, targets_N, size, dtype)
        chunks.begin_gradients(*ctx.needs_input_grad[:2])
        loss = x_ND.new_zeros((), dtype=chunks.wide)
        for rows, log_probs, dlogits in chunks.log_probs():
            targets_N1 = chunks.targets_N1[rows]
            at_targets = log_probs.gather(1, targets_N1)
            loss -= at_targets.sum()
            torch.exp(log_probs, out=dlogits)
            # Not dlogits - 1: near 1, half precision has no difference left.
            dlogits.scatter_(1, targets_N1, at_targets.expm1().to(dlogits.dtype))
            chunks.add_gradients(rows, dlogits)
        ctx.save_for_backward(*chunks.gradients())
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        known = ctx.saved_tensors
        if grad.device.type != "cpu" or grad != 1:  # asking a GPU would wait for it
            known = [None if of is None else (of * grad).to(of.dtype) for of in known]
        return *known, None, None, None


class _TokenLosses(torch.autograd.Function):
    """[N]; the backward pass computes the logits again."""

    @staticmethod
    def forward(ctx, x_ND, weight_VD, targets_N, size, dtype):
        ctx.save_for_backward(x_ND, weight_VD, targets_N)
        ctx.given = size, dtype
        return _Chunks(x_ND, weight_VD, targets_N, size, dtype).losses()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N):
        chunks = _Chunks(*ctx.saved_tensors, *ctx.given)
        chunks.begin_gradients(*ctx.needs_input_grad[:2])
        for rows, log_probs, dlogits in chunks.log_probs():
            targets_N1 = chunks.targets_N1[rows]
            at_targets = log_probs.gather(1, targets_N1)
            wide = log_probs.exp_().scatter_(1, targets_N1, at_targets.expm1())
            torch.mul(wide, grad_N[rows].unsqueeze(1), out=dlogits)
            chunks.add_gradients(rows, dlogits)
        return *chunks.gradients(), None, None, None
