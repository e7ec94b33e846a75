"""Where processes that hold some of the experts find them when a checkpoint is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextvars import ContextVar

from torch import Tensor

source: ContextVar[Callable[[str, slice], Tensor] | None] = ContextVar("source", default=None)
"""Gives rows of an expert parameter or buffer, by its name in the checkpoint."""

# What FSDP puts into names.
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_fpw_module|module)\.")


def plain_name(name: str) -> str:
    """`name` as in the checkpoint, without what wraps the modules."""
    return _WRAPPERS.sub("", name)
