"""Operations for which the host waits for a GPU, seen on a CPU."""

from __future__ import annotations

import traceback
from collections.abc import Collection
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import evomoe_plugin

aten = torch.ops.aten
PACKAGE = f"{Path(evomoe_plugin.__file__).parent}/"
# Their result, or its shape, depends on values of a tensor.
WAITING = {
    aten._local_scalar_dense,
    aten.bincount,
    aten.equal,
    aten.is_nonzero,
    aten.lift_fresh,
    aten.masked_select,
    aten.nonzero,
    aten.unique_consecutive,
    aten._unique,
    aten._unique2,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class HostWaits(TorchDispatchMode):
    """Refuses what waits: values read, shapes that depend on values, indexing by a mask, and
    numbers copied to the device (`torch.tensor` with a device).

    Args:
        allowed: what is not refused, "operator at file", or "file" for all in it; files are
            relative to the package.
    """

    def __init__(self, allowed: Collection[str] = ()):
        super().__init__()
        self.allowed = allowed
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _waits(function._overloadpacket, args, kwargs):
            lines = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
            file = lines[-1].filename.removeprefix(PACKAGE) if lines else "a backward pass"
            found = f"{function._overloadpacket.__name__} at {file}"
            self.found.append(found)
            if found not in self.allowed and file not in self.allowed:
                line = f":{lines[-1].lineno}" if lines else ""
                raise AssertionError(f"the host waits: {found}{line}")
        return function(*args, **kwargs)


def _waits(operator, args, kwargs) -> bool:
    if operator in INDEXING:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if operator is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    return operator in WAITING
