"""Where ranks that hold some of the experts read them from when a checkpoint is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextvars import ContextVar

from torch import Tensor

source: ContextVar[Callable[[str, slice], Tensor] | None] = ContextVar("source", default=None)
"""Returns rows of an expert parameter or buffer, by its name in the checkpoint."""

# Prefixes that FSDP adds to names.
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_fpw_module|module)\.")


def plain_name(name: str) -> str:
    """`name` as in the checkpoint, without the prefixes of wrappers."""
    return _WRAPPERS.sub("", name)
