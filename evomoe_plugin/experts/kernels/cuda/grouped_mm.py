"""Grouped feed-forward networks on GPUs, by `torch.nn.functional.grouped_mm`.

Row counts stay on the device, without synchronization. A token's rows are summed in the order of
its experts, without atomics, so that a step is deterministic. The elementwise operations between
matmuls are fused by `torch.compile`.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from evomoe_plugin.experts.kernels import Call

HAS_TRITON = importlib.util.find_spec("triton") is not None  # CPU builds of torch come without
if HAS_TRITON:
    from evomoe_plugin.experts.kernels.cuda.combine import combine, sort_by_token

logger = logging.getLogger(__name__)

MULTIPLE = 8
"""D and F must be multiples of this: rows of 16 bytes."""


@functools.cache
def why_not(device: torch.device, dtype: torch.dtype, model_dim: int, ffn_dim: int) -> str:
    """Why `grouped_mm` cannot be used for these sizes; '' if it can."""
    if dtype != torch.bfloat16:
        return f"matmuls are in {str(dtype).removeprefix('torch.')}, not bfloat16"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Hopper"
    if model_dim % MULTIPLE or ffn_dim % MULTIPLE:
        return f"widths {model_dim} and {ffn_dim} are not both multiples of {MULTIPLE}"
    if not HAS_TRITON:
        return "Triton is not installed"
    return ""


class GroupedMMFFN(torch.autograd.Function):
    """As `kernels.cpu.grouped.grouped_ffn`, with the row counts as a tensor."""

    @staticmethod
    def forward(ctx, call, counts_E, token_ids, by_token, x, row_weights, *stacks):
        ends_E = counts_E.cumsum(0).to(torch.int32)
        order, starts = by_token or sort_by_token(token_ids, x.size(0))
        matrix1, bias1, matrix3, matrix2, bias2 = (
            None if s is None else s.to(call.dtype) for s in stacks
        )
        experts = None
        if bias1 is not None:
            row_N = torch.arange(call.num_rows, dtype=torch.int32, device=x.device)
            experts = torch.searchsorted(ends_E, row_N, right=True).clamp(max=len(ends_E) - 1)

        rows = _fetch(x, token_ids, call)
        h = grouped_mm(rows, matrix1.transpose(1, 2), offs=ends_E)
        h3 = None if matrix3 is None else grouped_mm(rows, matrix3.transpose(1, 2), offs=ends_E)
        dropped = torch.rand(h.shape, device=x.device) < call.dropout if call.dropout else None
        hidden = h, h3, bias1, experts, dropped
        active = _run(_activate, call, hidden)
        outputs = grouped_mm(active, matrix2, offs=ends_E)
        if bias2 is not None:
            outputs += bias2[experts]
        ctx.save_for_backward(
            ends_E, token_ids, x, row_weights, *stacks, h, h3, experts, dropped, order, starts
        )
        ctx.call = call
        if token_ids is None:
            return outputs.to(x.dtype)
        return combine(outputs, row_weights, order, starts, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        ends_E, token_ids, x, row_weights, *stacks, h, h3, experts, dropped, order, starts = (
            ctx.saved_tensors
        )
        call, (fc1, fc1_bias, fc3, fc2, fc2_bias) = ctx.call, stacks
        need_x, need_row_weights, *need_stacks = ctx.needs_input_grad[4:]
        need1, need_bias1, need3, need2, need_bias2 = need_stacks
        matrix1, bias1, matrix3, matrix2, bias2 = (
            None if s is None else s.to(call.dtype) for s in stacks
        )

        grads = _fetch(grad_out, token_ids, call)
        grad_active = grouped_mm(grads, matrix2.transpose(1, 2), offs=ends_E)
        weights = None if row_weights is None else row_weights.unsqueeze(1)
        hidden = h, h3, bias1, experts, dropped
        active, dots, grad_h3 = _run(_differentiate, call, hidden, grad_active, weights)
        grad_h = grad_active
        if need_row_weights and bias2 is not None:
            dots = dots + (grads.float() * bias2[experts]).sum(1)
        if weights is not None:
            grads = torch.mul(grads, weights, out=torch.empty_like(grads))

        def stack_gradient(stack: Tensor, a: Tensor, b: Tensor) -> Tensor:
            grad = grouped_mm(a.t(), b, offs=ends_E)
            return (grad if call.grad_scale == 1 else grad * call.grad_scale).to(stack.dtype)

        def bias_gradient(stack: Tensor, rows: Tensor) -> Tensor:
            ones = rows.new_ones(call.num_rows, MULTIPLE)
            return stack_gradient(stack, rows, ones)[:, :, 0].contiguous()

        grad2 = stack_gradient(fc2, active, grads) if need2 else None
        grad_bias2 = bias_gradient(fc2_bias, grads) if need_bias2 else None
        del active, grads
        rows = _fetch(x, token_ids, call) if need1 or need3 else None
        grad1 = stack_gradient(fc1, grad_h, rows) if need1 else None
        grad3 = stack_gradient(fc3, grad_h3, rows) if need3 else None
        grad_bias1 = bias_gradient(fc1_bias, grad_h) if need_bias1 else None
        grad_x = None
        if need_x:
            grad_x = grouped_mm(grad_h, matrix1, offs=ends_E)
            if fc3 is not None:
                grad_x += grouped_mm(grad_h3, matrix3, offs=ends_E)
            if token_ids is not None:
                grad_x = combine(grad_x, None, order, starts, x.dtype)
            grad_x = grad_x.to(x.dtype)
        dots = dots.to(row_weights.dtype) if need_row_weights else None
        return None, None, None, None, grad_x, dots, grad1, grad_bias1, grad3, grad2, grad_bias2


def _fetch(x: Tensor, token_ids: Tensor | None, call: Call) -> Tensor:
    rows = x if token_ids is None else x.index_select(0, token_ids.clamp(min=0))  # -1: unused
    return rows.to(call.dtype).contiguous()


def _activate(function, p, h, h3, bias, experts, dropped):
    """The hidden rows after the activation."""
    if bias is not None:
        h = h + bias[experts]
    active = function(h)
    if h3 is not None:
        active = active * h3
    return active if dropped is None else active.masked_fill(dropped, 0) / (1 - p)


def _differentiate(function, p, h, h3, bias, experts, dropped, grad, weights):
    """The hidden rows after the activation, their dot products with `grad`, and the weighted
    gradient of h3; `grad` becomes that of h."""
    if bias is not None:
        h = h + bias[experts]
    plain, derive = torch.func.vjp(function, h)
    active = plain if h3 is None else plain * h3
    if dropped is not None:
        active = active.masked_fill(dropped, 0) / (1 - p)
    dots = (active.float() * grad).sum(1)
    grad_active = grad if dropped is None else grad.masked_fill(dropped, 0) / (1 - p)
    if weights is not None:
        grad_active = (grad_active * weights).to(grad.dtype)
    if h3 is None:
        grad.copy_(derive(grad_active)[0])
        return active, dots, None
    grad_h3 = grad_active * plain
    grad.copy_(derive(grad_active * h3)[0])
    return active, dots, grad_h3


_fuses = True
_compiled = functools.cache(torch.compile)


def _run(work: Callable, call: Call, hidden: tuple, *given: Any) -> Any:
    """Call `work`, compiled if possible; torch.compile specializes on sizes 0 and 1."""
    global _fuses
    tensors = (*hidden, *given)
    is_one_kernel = work is _activate and all(t is None for t in hidden[1:])
    if _fuses and call.num_rows > 1 and not is_one_kernel:
        for tensor in tensors:
            if tensor is not None and tensor.size(0) == call.num_rows:
                torch._dynamo.mark_dynamic(tensor, 0)
        try:
            return _compiled(work)(call.activation.function, call.dropout, *tensors)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # any compiler error; no tensor has been modified yet
            _fuses = False
            logger.warning(
                "torch.compile failed (%s): operations between the experts' matmuls are not fused",
                str(error).strip().split("\n")[0],
            )
    return work(call.activation.function, call.dropout, *tensors)
