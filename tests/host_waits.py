"""Operations for which the host waits for a GPU, seen on a CPU."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

import fairseq
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import evomoe_plugin
from evomoe_plugin.routing import kernels as routing_kernels
from evomoe_plugin.routing import waits

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
    """Refuses what waits: values read, shapes that depend on values, indexing by a mask, copies to
    the host, and numbers copied to the device (`torch.tensor` with a device).

    Args:
        allowed: what is not refused, "operator at file", or "file" for all in it; files are
            relative to the package, others begin with `fairseq/`. None: everything.
    """

    def __init__(self, allowed: Collection[str] | None = ()):
        super().__init__()
        self.allowed = allowed
        self.found: list[str] = []
        self._copies = _Copies(self._find)

    def __enter__(self):
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _waits(function._overloadpacket, args, kwargs):
            self._find(function._overloadpacket.__name__)
        return function(*args, **kwargs)

    def _find(self, name: str) -> None:
        lines = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGES)]
        file = _short(lines[-1].filename) if lines else "a backward pass"
        found = f"{name} at {file}"
        self.found.append(found)
        if self.allowed is not None and not {found, file} & set(self.allowed):
            line = f":{lines[-1].lineno}" if lines else ""
            raise AssertionError(f"the host waits: {found}{line}")


class _Copies(TorchFunctionMode):
    """Calls `find` for copies to the host, which are no operators on a CPU."""

    def __init__(self, find: Callable[[str], None]):
        super().__init__()
        self._find = find

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        is_copy = function in (torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist)
        if is_copy or (
            function is torch.Tensor.to and "cpu" in map(str, [*args[1:], *kwargs.values()])
        ):
            self._find(name)
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


class _Kernels:
    """Kernels that are counted and not launched."""

    GROUP, BACKWARD_COLUMNS = 8, 64

    def __init__(self):
        self.launched: Counter[str] = Counter()

    def __getattr__(self, name):
        return _Grid(lambda *args, **kwargs: self.launched.update([name]))


class _Grid:
    def __init__(self, launch):
        self.launch = launch

    def __getitem__(self, grid):
        return self.launch


class _Zeros:
    """torch, whose memory holds zeros at first and not anything: a run stops at NaN."""

    def __getattr__(self, name):
        function = getattr(torch, name)
        if not name.startswith("empty"):
            return function

        def zeros(*args, **kwargs):
            with _disable_current_modes():
                return function(*args, **kwargs).zero_()

        return zeros


def pretend_a_gpu(monkeypatch) -> Counter[str]:
    """Take the code path of GPUs on a CPU: kernels of routing in Triton's interpreter, and without
    running those of experts: what the host does before and after them does not depend on values.

    Returns:
        How often each kernel would have been launched.
    """
    from triton import knobs
    from triton.runtime.interpreter import InterpretedFunction

    from evomoe_plugin.experts.kernels import cuda
    from evomoe_plugin.experts.kernels.cuda import combine, fused
    from evomoe_plugin.models import vocabulary_kernel

    kernels = _Kernels()
    monkeypatch.setattr(cuda, "function_for", lambda *_: fused.FusedFFN)
    monkeypatch.setattr(fused, "kernels", kernels)
    monkeypatch.setattr(combine, "_kernel", kernels.combine)
    for module in (fused, combine):
        monkeypatch.setattr(module, "torch", _Zeros())
    monkeypatch.setattr(waits, "waiting_costs", lambda _: True)
    run = InterpretedFunction.run

    def counted(function, *args, **kwargs):
        kernels.launched.update([function.__name__])
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return run(function, *args, **kwargs)

    def differentiated(logits, *_):  # row by row, which the interpreter would take seconds for
        kernels.launched.update(["_differentiate"])
        return logits.zero_().float().new_zeros(2, len(logits)).unbind()

    monkeypatch.setattr(vocabulary_kernel, "differentiate_", differentiated)
    monkeypatch.setattr(InterpretedFunction, "run", counted)
    interpreted = knobs.runtime.interpret
    monkeypatch.setattr(routing_kernels, "usable", lambda _: interpreted)
    return kernels.launched
