"""Triton kernels of routing: on a GPU, one launch where torch's operators are dozens."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable)


def constant(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, which takes a second to import."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
@constant
def why_not(device: torch.device) -> str:
    """Why Triton's kernels cannot be used on `device`, a GPU; '' if they can."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler (gcc, clang or $CC)"
    return ""


def usable(device: torch.device) -> bool:
    """Whether the kernels compute on `device`; otherwise torch's operators do the same."""
    return device.type == "cuda" and not why_not(device)
