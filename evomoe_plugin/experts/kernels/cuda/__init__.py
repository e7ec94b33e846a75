"""Grouped FFN on CUDA: Triton kernels, and torch's `grouped_mm` for activations that they lack."""

from __future__ import annotations

import functools
import logging

import torch

from evomoe_plugin.experts.kernels import Call
from evomoe_plugin.routing.kernels import constant, why_not

logger = logging.getLogger(__name__)


def function_for(
    call: Call, device: torch.device, model_dim: int, ffn_dim: int
) -> type[torch.autograd.Function] | None:
    """The autograd function that computes the call on `device`.

    None: that for CPUs, which waits for the row counts and launches the matmuls of each expert; on
    a GPU this is logged once.
    """
    if device.type != "cuda":
        return None
    reason = why_not_fused(device, call.dtype, call.activation.kernel)
    if not reason:
        from evomoe_plugin.experts.kernels.cuda.fused import FusedFFN

        return FusedFFN
    from evomoe_plugin.experts.kernels.cuda import grouped_mm

    reason_too = grouped_mm.why_not(device, call.dtype, model_dim, ffn_dim)
    say_once(reason, reason_too)
    return None if reason_too else grouped_mm.GroupedMMFFN


@functools.cache
@constant
def why_not_fused(device: torch.device, dtype: torch.dtype, kernel: str | None) -> str:
    """Why the Triton kernels cannot be used; '' if they can.

    Args:
        device: a GPU.
        dtype: of the matmuls.
        kernel: `Activation.kernel`.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"matmuls are in {str(dtype).removeprefix('torch.')}"
    if reason := why_not(device):
        return reason
    return "they do not have this activation" if kernel is None else ""


@functools.cache
def say_once(reason: str, reason_too: str) -> None:
    """Log, once for each pair of reasons, what computes the experts in place of the kernels."""
    instead = "torch's grouped_mm computes the experts"
    if reason_too:
        instead = f"nor is grouped_mm: {reason_too}; the matmuls of each expert are launched apart"
    logger.warning("the Triton kernels of the experts are not used: %s; %s", reason, instead)
