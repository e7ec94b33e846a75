"""Causal attention with dropout on CPUs, where torch's fused attention has no dropout."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 64
"""Queries per block; measured from 64 to 256, at 128 to 2048 tokens."""


def attend_with_dropout(q: Tensor, k: Tensor, v: Tensor, scale: float, p: float) -> Tensor:
    """dropout(softmax(scale * q k^T, causal)) v, computed in blocks of queries.

    Without its fused kernel, torch computes the weights of all keys, future ones included, in
    several passes. Here each block of queries uses only the keys up to its end.

    Args:
        q, k, v: [B, heads, T, head width].
        scale: of the logits.
        p: probability that a weight is dropped; the others are divided by 1 - p.
    Returns:
        [B, heads, T, head width].
    """
    B, H, T, _ = q.shape
    # Gradients of keys and values are sums over blocks: too inexact in half precision.
    wide = torch.promote_types(q.dtype, torch.float32)
    y = _Attend.apply(*(x.reshape(B * H, T, -1).to(wide) for x in (q, k, v)), scale, p)
    return y.view(B, H, T, -1).to(q.dtype)


class _Attend(torch.autograd.Function):
    """q, k, v: [heads, T, head width]."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, q, k, v, scale, p):
        T = q.size(1)
        future = q.new_full((BLOCK, BLOCK), float("-inf")).triu(1)
        y, saved = torch.empty_like(v), []
        for start in range(0, T, BLOCK):
            end = min(start + BLOCK, T)
            weights = torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2)).mul_(scale)
            weights[..., start:].add_(future[: end - start, : end - start])
            weights = weights.softmax(-1)
            kept, mask = torch.native_dropout(weights, p, True)
            y[:, start:end] = torch.bmm(kept, v[:, :end])
            saved += [weights, mask]
        ctx.save_for_backward(q, k, v, y, *saved)
        ctx.scale, ctx.keep = scale, 1 - p
        return y

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, y, *saved = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        # Softmax backward: the sum over keys of weight * its gradient is y * grad.
        mean = (grad * y).sum(-1, keepdim=True)
        for block, (weights, mask) in enumerate(zip(saved[::2], saved[1::2], strict=True)):
            end = weights.size(2)
            rows = slice(block * BLOCK, end)
            factor = mask.to(weights.dtype)
            if ctx.keep:  # with p = 1 everything is dropped
                factor.div_(ctx.keep)
            d = torch.bmm(grad[:, rows], v[:, :end].transpose(1, 2)).mul_(factor)
            dv[:, :end].baddbmm_(factor.mul_(weights).transpose(1, 2), grad[:, rows])
            d.sub_(mean[:, rows]).mul_(weights)
            dq[:, rows] = torch.bmm(d, k[:, :end]).mul_(ctx.scale)
            dk[:, :end].baddbmm_(d.transpose(1, 2), q[:, rows], alpha=ctx.scale)
        return dq, dk, dv, None, None
