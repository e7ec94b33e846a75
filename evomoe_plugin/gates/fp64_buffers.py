"""Numbers that a gate keeps and changes, at full precision in every run.

A model in half precision, and FSDP with mixed precision, cast buffers of floats: a bias that moves
by 0.001 would stand still. Such numbers are kept as the bits of fp64, in a buffer of integers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def register_fp64_buffer(module: nn.Module, name: str, value: Tensor) -> None:
    """Give `module` the buffer `NAME_bits`, in the checkpoint, that holds `value`."""
    module.register_buffer(f"{name}_bits", value.to(torch.float64).view(torch.int64))


def fp64_buffer(module: nn.Module, name: str) -> Tensor:
    """The value, fp64: a view, to be changed in place."""
    return getattr(module, f"{name}_bits").view(torch.float64)
