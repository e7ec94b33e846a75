"""Mixed precision: matrix products in bf16, everything else in the precision of the weights.

The weights stay in fp32, and so do what the optimizer keeps of them, norms, softmaxes, losses, the
gates (`--moe-gating-use-fp32`) and the sums of the residual stream. Operands of products are
rounded to bf16 as they are multiplied; sums within a product are of fp32 (Micikevicius et al.,
arXiv 1710.03740; of bf16, Kalamkar et al., arXiv 1905.12322). No loss scale is needed: bf16 has the
range of fp32.
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

from evomoe_plugin.config.options import PRODUCT_DTYPES
from evomoe_plugin.experts.precision import operand_dtype, product_dtype

logger = logging.getLogger(__name__)

_TORCH = dict(zip(PRODUCT_DTYPES, (None, torch.bfloat16), strict=True))


def products_in(dtype: str, device_type: str) -> AbstractContextManager[None]:
    """Inside, products on such a device are of precision `dtype`, one of `PRODUCT_DTYPES`.

    It is torch's autocast, which functions of their own ask: `torch.is_autocast_enabled`.
    """
    if _TORCH[dtype] is None:
        return nullcontext()
    return torch.autocast(device_type, dtype=_TORCH[dtype])


def in_products_dtype(method: Callable) -> Callable:
    """Decorator of a decoder's methods: their products are as `--moe-products-dtype` says."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.products():
            return method(self, *args, **kwargs)

    return wrapper


class Linear(torch.nn.Linear):
    """torch's, but where a CPU would emulate its products (`emulated`): there rounded operands are
    multiplied in fp32, which is several times faster, and the answer is rounded."""

    @classmethod
    def of(cls, linear: torch.nn.Module) -> torch.nn.Module:
        """One with the parameters of `linear`; `linear` itself if it is more than torch's."""
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
            operands = (None if operand is None else operand.to(dtype).float()
                        for operand in (input, self.weight, self.bias))
            return functional.linear(*operands).to(dtype)


def emulated(x: Tensor) -> torch.dtype | None:
    """The precision of products with x, its own or that of autocast, if they are to be computed in
    fp32 instead; otherwise None."""
    dtype = operand_dtype(x)
    return None if product_dtype(dtype, x.device.type) is dtype else dtype


def log_products(dtype: str) -> None:
    """Say it where a CPU would compute products in bf16 no faster than in fp32."""
    if _TORCH[dtype] is not None and not torch.cuda.is_available() and (
            product_dtype(_TORCH[dtype], "cpu") is not _TORCH[dtype]):
        logger.warning("--moe-products-dtype %s: this CPU has no instructions for such products: "
                       "rounded operands are multiplied in fp32, and that is slower here than "
                       "those in fp32 are", dtype)
