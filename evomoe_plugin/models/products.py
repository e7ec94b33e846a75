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

from evomoe_plugin.experts.precision import product_dtype
from evomoe_plugin.options import PRODUCT_DTYPES

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


def log_products(dtype: str) -> None:
    """Say it where a CPU would compute products in bf16 no faster than in fp32."""
    if _TORCH[dtype] is not None and not torch.cuda.is_available() and (
            product_dtype(_TORCH[dtype], "cpu") is not _TORCH[dtype]):
        logger.warning("--moe-products-dtype %s: this CPU has no instructions for such products "
                       "and emulates them; they are slower here than those in fp32", dtype)
