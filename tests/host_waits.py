"""Operations for which the host waits for a GPU, seen on a CPU."""

from __future__ import annotations

import traceback
from collections.abc import Collection
from pathlib import Path

import fairseq
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import evomoe_plugin
from evomoe_plugin.routing import capacity, plan

aten = torch.ops.aten
PACKAGES = tuple(f"{Path(package.__file__).parent}/" for package in (evomoe_plugin, fairseq))
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
            relative to the package, others begin with `fairseq/`.
    """

    def __init__(self, allowed: Collection[str] = ()):
        super().__init__()
        self.allowed = allowed
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _waits(function._overloadpacket, args, kwargs):
            lines = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGES)]
            file = _short(lines[-1].filename) if lines else "a backward pass"
            found = f"{function._overloadpacket.__name__} at {file}"
            self.found.append(found)
            if found not in self.allowed and file not in self.allowed:
                line = f":{lines[-1].lineno}" if lines else ""
                raise AssertionError(f"the host waits: {found}{line}")
        return function(*args, **kwargs)


def _short(path: str) -> str:
    ours, theirs = PACKAGES
    return path.removeprefix(ours).replace(theirs, "fairseq/")


def _waits(operator, args, kwargs) -> bool:
    if operator in INDEXING:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if operator is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    return operator in WAITING


class _Launch:
    """A kernel that is not launched."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


class _Combine:
    """The kernel of `combine`, for rows of zeros: a model stops at NaN."""

    def __getitem__(self, grid):
        return lambda rows, weights, order, starts, out, *others: out.zero_()


class _Kernels:
    GROUP, BACKWARD_COLUMNS = 8, 64

    def __getattr__(self, name):
        return _Launch()


def pretend_a_gpu(monkeypatch) -> None:
    """Take the code path of GPUs on a CPU, without running the experts' kernels: what the host does
    before and after them does not depend on values."""
    from evomoe_plugin.experts.kernels import cuda
    from evomoe_plugin.experts.kernels.cuda import combine, fused

    monkeypatch.setattr(cuda, "function_for", lambda *_: fused.FusedFFN)
    monkeypatch.setattr(fused, "kernels", _Kernels())
    monkeypatch.setattr(combine, "_kernel", _Combine())
    for module in (plan, capacity):
        monkeypatch.setattr(module, "waiting_costs", lambda _: True)
