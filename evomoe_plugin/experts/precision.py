"""Matmul dtype by device: fp32 where bf16/fp16 would be emulated."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

INSTRUCTIONS = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16", "fp16"),
}
"""CPU capabilities, any of which computes matmuls of the dtype natively."""


def operand_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the operands of a matmul with x: its own, or that of autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@functools.cache
def native_matmul_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Dtype to compute matmuls of `dtype` operands in; results are then rounded to `dtype`.

    A CPU without instructions for half precision emulates it, several times slower than fp32.
    """
    if (
        dtype not in INSTRUCTIONS
        or device_type != "cpu"
        or any(torch.cpu.get_capabilities().get(name) for name in INSTRUCTIONS[dtype])
    ):
        return dtype
    logger.info(
        "this CPU has no instructions for matmuls in %s (%s): they are computed in fp32 "
        "and rounded",
        str(dtype).removeprefix("torch."),
        ", ".join(INSTRUCTIONS[dtype]),
    )
    return torch.float32
