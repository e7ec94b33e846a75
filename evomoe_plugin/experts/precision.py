"""In which precision a device multiplies matrices of half precision."""

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
"""What a CPU must have one of to multiply such matrices itself."""


def operand_dtype(x: Tensor) -> torch.dtype:
    """Precision that operands of products with x have: its own, or that of autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@functools.cache
def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Precision in which products of `dtype` are best computed: exact ones are rounded to it.

    A CPU without instructions for half precision emulates them, several times slower than it
    multiplies in fp32.
    """
    if dtype not in INSTRUCTIONS or device_type != "cpu":
        return dtype
    if not hasattr(torch.cpu, "get_capabilities"):  # older torch: not known
        return dtype
    if any(torch.cpu.get_capabilities().get(name) for name in INSTRUCTIONS[dtype]):
        return dtype
    logger.info("this CPU has no instructions for products in %s (%s): they are computed in fp32, "
                "and rounded", str(dtype).removeprefix("torch."),
                ", ".join(INSTRUCTIONS[dtype]))
    return torch.float32
