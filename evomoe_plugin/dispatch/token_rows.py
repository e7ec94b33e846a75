"""The rows of routed pairs, taken from tokens, and each token's weighted sum of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evomoe_plugin.routing import kernels


class TokenRows:
    """N pairs of T tokens, in any order.

    On a GPU with Triton a token's rows and their gradients are added in a fixed order, without
    atomics, so that a step gives the same bits again.

    Args:
        token_ids_N: int64, the token of each pair.
        num_tokens: T.
        by_token: as `RoutingPlan.by_token`, of these pairs in this order; None: found where needed.
    """

    def __init__(
        self, token_ids_N: Tensor, num_tokens: int, by_token: tuple[Tensor, Tensor] | None = None
    ):
        self._token_ids_N, self._num_tokens = token_ids_N, num_tokens
        self._by_token = None
        if kernels.usable(token_ids_N.device):
            from evomoe_plugin.experts.kernels.cuda.combine import sort_by_token

            self._by_token = by_token or sort_by_token(token_ids_N, num_tokens)

    def take(self, x_TD: Tensor) -> Tensor:
        """The row of each pair's token: [N, D]."""
        if self._by_token is None:
            return x_TD.index_select(0, self._token_ids_N)
        return _Take.apply(x_TD, self._token_ids_N, *self._by_token)

    def sum(self, rows_ND: Tensor, weights_N: Tensor, dtype: torch.dtype) -> Tensor:
        """The weighted sum of each token's rows, added in fp32 at least: [T, D]."""
        if self._by_token is not None:
            return _Sum.apply(rows_ND, weights_N, self._token_ids_N, *self._by_token, dtype)
        wide = torch.promote_types(rows_ND.dtype, torch.float32)
        weighted_ND = rows_ND.to(wide) * weights_N.to(wide).unsqueeze(1)
        sums_TD = weighted_ND.new_zeros(self._num_tokens, rows_ND.size(1))
        return sums_TD.index_add(0, self._token_ids_N, weighted_ND).to(dtype)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token_ids: Tensor, order: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(order, starts)
        return x.index_select(0, token_ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        from evomoe_plugin.experts.kernels.cuda.combine import combine

        order, starts = ctx.saved_tensors
        return combine(grad.contiguous(), None, order, starts, grad.dtype), None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor,
        token_ids: Tensor,
        order: Tensor,
        starts: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        from evomoe_plugin.experts.kernels.cuda.combine import combine

        ctx.save_for_backward(rows, weights, token_ids)
        return combine(rows.contiguous(), weights, order, starts, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, weights, token_ids = ctx.saved_tensors
        grad_ND = grad.index_select(0, token_ids).float()
        grad_weights = None
        if ctx.needs_input_grad[1]:
            grad_weights = (grad_ND * rows).sum(1).to(weights.dtype)
        return (grad_ND * weights.unsqueeze(1)).to(rows.dtype), grad_weights, None, None, None, None
