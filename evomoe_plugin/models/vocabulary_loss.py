"""Cross-entropy over the vocabulary without the logits of all tokens at once.

torch's `linear_cross_entropy` (2.13 and newer) does the same in fp32, at the same speed; in bf16 it
rounds the loss and the gradient of fp32 weights to bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evomoe_plugin.experts.precision import native_matmul_dtype, operand_dtype
from evomoe_plugin.routing import kernels

CHUNKS = {"cpu": 512, "cuda": 4096}
"""Tokens of a chunk, measured: on a CPU its logits stay in cache, on a GPU matmuls of fewer rows
are slower."""


def vocabulary_loss(
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    padding_idx: int,
    chunk: int | None = None,
    reduce: bool = True,
    bias_V: Tensor | None = None,
    num_padding: int | None = None,
) -> Tensor:
    """Negative log-likelihood of the targets under softmax(x weight^T + bias).

    Logits exist for one chunk of tokens at a time, and their gradient is computed with them (Liger
    kernel, arXiv 2410.10989): memory is V * (chunk + D) instead of several times T * V. Matmuls are
    in the dtype of `x_TD` or of autocast; softmax, losses and sums over chunks in fp32 (fp64 for
    fp64). In fp16, and per token, the backward pass recomputes the logits for the gradient: there
    the loss scale is known, without which small gradients would underflow in fp16.

    Args:
        x_TD: features.
        weight_VD: output embeddings.
        targets_T: int64 token ids; where one is `padding_idx` the loss is 0 and not computed.
        chunk: tokens of a chunk; None: `CHUNKS` of the device.
        reduce: return the sum.
        bias_V: of the logits.
        num_padding: how many targets are padding; None: look, for which the host waits for a GPU.
    Returns:
        A scalar, or [T] without `reduce`.
    """
    return smoothed_vocabulary_loss(
        x_TD, weight_VD, targets_T, padding_idx, chunk, reduce, bias_V, 0.0, num_padding
    )[0]


def smoothed_vocabulary_loss(
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    padding_idx: int,
    chunk: int | None,
    reduce: bool,
    bias_V: Tensor | None,
    smoothing: float,
    num_padding: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `vocabulary_loss`, with label smoothing as in fairseq: the cross-entropy with
    1 - smoothing at the target, and the rest in equal parts at all other entries.

    Returns:
        The smoothed loss; and the one without smoothing, which has no gradient.
    """
    device = x_TD.device.type
    dtype = operand_dtype(x_TD)
    if num_padding is None:
        num_padding = int(targets_T.eq(padding_idx).sum())
    whole = num_padding == 0
    x_ND, targets_N = x_TD, targets_T
    if not whole:
        is_kept_T = targets_T.ne(padding_idx)
        kept_N = is_kept_T.nonzero_static(size=len(targets_T) - num_padding).squeeze(1)
        x_ND, targets_N = x_TD[kept_N], targets_T[kept_N]
    size = chunk or CHUNKS.get(device, CHUNKS["cuda"])
    given = x_ND, weight_VD, bias_V, targets_N, size, dtype, smoothing
    learned = [value for value in given[:3] if value is not None]
    needs_grad = torch.is_grad_enabled() and any(value.requires_grad for value in learned)
    with torch.autocast(device, enabled=False):
        if reduce and needs_grad and dtype != torch.float16:
            return _SummedLoss.apply(*given)
        losses = _TokenLosses.apply(*given) if needs_grad else _Chunks(*given).losses()
    if reduce:
        return losses[0].sum(), losses[1].sum()
    if whole:
        return losses
    smoothed_T, plain_T = (
        losses_N.new_zeros(len(targets_T)).index_copy(0, kept_N, losses_N) for losses_N in losses
    )
    return smoothed_T, plain_T


class _Chunks:
    """Log-probabilities, losses and gradients, chunk by chunk.

    Args:
        x_ND, weight_VD, bias_V, targets_N: as in `vocabulary_loss`, without padding.
        size: tokens of a chunk.
        dtype: of matmul operands.
        smoothing: as in `smoothed_vocabulary_loss`.
    """

    def __init__(
        self,
        x_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        size: int,
        dtype: torch.dtype,
        smoothing: float,
    ):
        computed = native_matmul_dtype(dtype, x_ND.device.type)
        self.x_ND, self.weight_VD = (given.to(dtype).to(computed) for given in (x_ND, weight_VD))
        self.bias_V = None if bias_V is None else bias_V.to(dtype).to(computed)
        self.targets_N1 = targets_N.unsqueeze(1)
        self._rounded = None if computed is dtype else dtype
        self.wide = torch.promote_types(x_ND.dtype, torch.float32)
        self._out_dtypes = x_ND.dtype, weight_VD.dtype
        self._size = size
        self._smoothing = smoothing
        self._of_others = smoothing / max(len(weight_VD) - 1, 1)

    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their logits [rows, V], to overwrite; the next chunk reuses their memory."""
        N, V = len(self.x_ND), len(self.weight_VD)
        buffer = self.x_ND.new_empty(min(self._size, N), V)
        for start in range(0, N, self._size):
            rows = slice(start, min(start + self._size, N))
            logits = torch.mm(self.x_ND[rows], self.weight_VD.t(), out=buffer[: rows.stop - start])
            if self.bias_V is not None:
                logits += self.bias_V
            if self._rounded is not None:
                logits.copy_(logits.to(self._rounded))
            yield rows, logits

    def log_probs(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, their log-probabilities [rows, V], and the buffer of the logits, to overwrite; the
        next chunk reuses both."""
        for rows, logits in self.logits():
            if logits.dtype == self.wide:
                yield rows, torch.log_softmax(logits, 1, out=logits), logits
            else:
                yield rows, torch.log_softmax(logits, 1, dtype=self.wide), logits

    def losses(self) -> tuple[Tensor, Tensor]:
        """Smoothed and not, [N] each."""
        plain_N = self.x_ND.new_empty(len(self.x_ND), dtype=self.wide)
        smoothed_N = torch.empty_like(plain_N)
        for rows, log_probs, _ in self.log_probs():
            plain_N[rows] = -log_probs.gather(1, self.targets_N1[rows]).squeeze(1)
            smoothed_N[rows] = self._smoothed(plain_N[rows], log_probs)
        return smoothed_N, plain_N

    def _smoothed(self, plain_n: Tensor, log_probs: Tensor) -> Tensor:
        if not self._smoothing:
            return plain_n
        of_target = 1 - self._smoothing - self._of_others
        return of_target * plain_n - self._of_others * log_probs.sum(1)

    def _in_one_pass(self, grad_N: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Rows, their losses, smoothed and not, and the gradient of logits, in their memory."""
        from evomoe_plugin.models.vocabulary_kernel import differentiate_

        for rows, logits in self.logits():
            targets_N = self.targets_N1[rows].squeeze(1)
            scales_N = None if grad_N is None else grad_N[rows]
            losses = differentiate_(logits, targets_N, self._smoothing, self._of_others, scales_N)
            yield rows, *losses, logits

    def _by_operators(
        self, grad_N: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """As `_in_one_pass`."""
        for rows, log_probs, dlogits in self.log_probs():
            targets_N1 = self.targets_N1[rows]
            at_targets = log_probs.gather(1, targets_N1)
            plain_n = -at_targets.squeeze(1)
            smoothed_n = self._smoothed(plain_n, log_probs)
            # expm1, not dlogits - 1: half precision cannot represent the difference near 1.
            of_targets = at_targets.expm1() + self._smoothing
            if grad_N is None and not self._smoothing:
                torch.exp(log_probs, out=dlogits)
                dlogits.scatter_(1, targets_N1, of_targets.to(dlogits.dtype))
            else:
                wide = log_probs.exp_().sub_(self._of_others).scatter_(1, targets_N1, of_targets)
                scale = 1 if grad_N is None else grad_N[rows].unsqueeze(1)
                torch.mul(wide, scale, out=dlogits)
            yield rows, smoothed_n, plain_n, dlogits

    def gradients(
        self, of_x: bool, of_weight: bool, of_bias: bool, grad_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The sums of the losses, smoothed and not, and gradients of x, weight and bias: of the
        smoothed sum, or with `grad_N`, the gradient of each smoothed loss, of them."""
        dx_ND = torch.empty_like(self.x_ND, dtype=self._out_dtypes[0]) if of_x else None
        dweight_VD = torch.zeros_like(self.weight_VD, dtype=self.wide) if of_weight else None
        dbias_V = (
            self.weight_VD.new_zeros(len(self.weight_VD), dtype=self.wide) if of_bias else None
        )
        loss = self.x_ND.new_zeros((), dtype=self.wide)
        plain = torch.zeros_like(loss)
        in_one_pass = kernels.usable(self.x_ND.device) and self.wide == torch.float32
        differentiated = self._in_one_pass if in_one_pass else self._by_operators
        for rows, smoothed_n, plain_n, dlogits in differentiated(grad_N):
            loss += smoothed_n.sum()
            plain += plain_n.sum()
            if dx_ND is not None:
                dx_ND[rows] = dlogits @ self.weight_VD
            if dbias_V is not None:
                dbias_V += dlogits.sum(0, dtype=self.wide)
            if dweight_VD is None:
                continue
            if dlogits.dtype == self.wide:
                dweight_VD.addmm_(dlogits.t(), self.x_ND[rows])
            else:
                dweight_VD += dlogits.t() @ self.x_ND[rows]
        dtype = self._out_dtypes[1]
        return (
            loss,
            plain,
            dx_ND,
            None if dweight_VD is None else dweight_VD.to(dtype),
            None if dbias_V is None else dbias_V.to(dtype),
        )


class _SummedLoss(torch.autograd.Function):
    """The sums; the backward pass scales gradients computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        loss, plain, *gradients = _Chunks(*given).gradients(*ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(plain)
        return loss, plain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        known = ctx.saved_tensors
        if grad.device.type != "cpu" or grad != 1:  # comparing on a GPU would synchronize
            known = [None if of is None else (of * grad).to(of.dtype) for of in known]
        return *known, None, None, None, None


class _TokenLosses(torch.autograd.Function):
    """[N]; the backward pass recomputes the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        *given: Any,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_ND, weight_VD, bias_V, targets_N)
        ctx.given = given
        smoothed_N, plain_N = _Chunks(x_ND, weight_VD, bias_V, targets_N, *given).losses()
        ctx.mark_non_differentiable(plain_N)
        return smoothed_N, plain_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        chunks = _Chunks(*ctx.saved_tensors, *ctx.given)
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        _, _, *gradients = chunks.gradients(of_x, of_weight, of_bias, grad_N)
        return *gradients, None, None, None, None
