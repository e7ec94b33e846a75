"""Triton kernels of routing: on a GPU, one launch where torch's operators are dozens."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

_Function = TypeVar("_Function", bound=Callable)


def constant(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, which takes a second to import."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
@constant
def why_not(device: torch.device) -> str:
    """Why Triton's kernels cannot be used on `device`, a GPU; '' if they can."""
    if os.environ.get("EVOMOE_TRITON") == "0":
        return "EVOMOE_TRITON is 0"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler (gcc, clang or $CC)"
    return ""


def usable(device: torch.device) -> bool:
    """Whether the kernels compute on `device`; otherwise torch's operators do the same, which the
    log says once of a GPU."""
    return device.type == "cuda" and _usable_on_gpu(device)


@functools.cache
@constant
def _usable_on_gpu(device: torch.device) -> bool:
    reason = why_not(device)
    if reason:
        logger.info("torch's operators take the place of the kernels of routing: %s", reason)
    return not reason
