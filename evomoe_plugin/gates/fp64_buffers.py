"""fp64 buffers that keep their precision in every run.

Half precision and FSDP with mixed precision cast floating-point buffers: a bias that changes by
0.001 per update would not change at all. The bits of the fp64 values are therefore stored in an
integer buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def register_fp64_buffer(module: nn.Module, name: str, value: Tensor) -> None:
    """Register the buffer `NAME_bits` of `module`, in the checkpoint, with `value`."""
    module.register_buffer(f"{name}_bits", value.to(torch.float64).view(torch.int64))


def fp64_buffer(module: nn.Module, name: str) -> Tensor:
    """The value, fp64: a view, for changes in place."""
    return getattr(module, f"{name}_bits").view(torch.float64)
