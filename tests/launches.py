"""Kernels that a GPU would be given, counted on a CPU."""

from __future__ import annotations

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

# They give a tensor of memory that is there, or not written.
_FREE = set(
    "_reshape_alias _unsafe_view alias as_strided detach empty empty_like empty_strided expand "
    "lift_fresh new_empty new_empty_strided permute resize_ select slice split split_with_sizes "
    "squeeze t transpose unbind unsqueeze view".split()
)


class Launches(TorchDispatchMode):
    """Counts operators as one kernel each, but those that launch none."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._overloadpacket.__name__
        if function.namespace == "aten" and name not in _FREE:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))
