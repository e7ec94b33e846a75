"""Mixed precision: matmuls in bf16, everything else in the dtype of the weights.

The weights stay in fp32, and so do the optimizer's state, norms, softmaxes, losses, the gates
(`--moe-gating-use-fp32`) and the residual stream. Operands of a matmul are rounded to bf16, its
sums are in fp32 (Micikevicius et al., arXiv 1710.03740; for bf16, Kalamkar et al., arXiv
1905.12322). No loss scale is needed: bf16 has the range of fp32.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from evomoe_plugin.config.options import MATMUL_DTYPES
from evomoe_plugin.experts.precision import native_matmul_dtype, operand_dtype

logger = logging.getLogger(__name__)

_TORCH = dict(zip(MATMUL_DTYPES, (None, torch.bfloat16), strict=True))


def matmul_dtype(dtype: str, device_type: str) -> AbstractContextManager[None]:
    """Compute matmuls on `device_type` inside in `dtype`, one of `MATMUL_DTYPES`.

    This is torch's autocast, which our own autograd functions query with `operand_dtype`.
    """
    if _TORCH[dtype] is None:
        return nullcontext()
    return torch.autocast(device_type, dtype=_TORCH[dtype])


def in_matmul_dtype(method: Callable) -> Callable:
    """Decorate a method of a decoder to compute matmuls in the dtype of `--moe-matmul-dtype`."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.matmul_dtype():
            return method(self, *args, **kwargs)

    return wrapper


class Linear(torch.nn.Linear):
    """torch's, except where a CPU would emulate the matmul (`emulated`): there the rounded operands
    are multiplied in fp32, several times faster, and the output is rounded."""

    @classmethod
    def of(cls, linear: torch.nn.Module) -> torch.nn.Module:
        """A layer with the parameters of `linear`; `linear` itself if it is a subclass or has
        hooks."""
        if type(linear) is not torch.nn.Linear or linear._forward_pre_hooks:
            return linear
        made = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        return made

    def forward(self, input: Tensor) -> Tensor:
        dtype = emulated(input)
        if dtype is None:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype).float()
            return functional.linear(
                input.to(dtype).float(), self.weight.to(dtype).float(), bias
            ).to(dtype)


def emulated(x: Tensor) -> torch.dtype | None:
    """The dtype of matmuls with x, its own or autocast's, if the device would emulate it and fp32
    is to be used instead; otherwise None."""
    dtype = operand_dtype(x)
    return None if native_matmul_dtype(dtype, x.device.type) is dtype else dtype


def warn_if_emulated(dtype: str) -> None:
    """Log a warning where a CPU computes matmuls in `dtype` no faster than in fp32."""
    chosen = _TORCH[dtype]
    if (
        chosen is not None
        and not torch.cuda.is_available()
        and (native_matmul_dtype(chosen, "cpu") is not chosen)
    ):
        logger.warning(
            "--moe-matmul-dtype %s: this CPU has no instructions for it: rounded "
            "operands are multiplied in fp32, slower than fp32 matmuls",
            dtype,
        )
