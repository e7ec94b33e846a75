"""Memory for large short-lived tensors, kept from step to step.

malloc maps blocks above 32 MiB anew each time, and the kernel clears them page by page at first
use, which takes a tenth of a step with weight gradients and activations of that size. With
`mallopt` in its place (no mmap, no trim) an fp32 step is 2 to 9 % slower, since malloc asks for no
huge pages, and peak memory 8 to 46 % higher.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
SMALLEST = HUGE_PAGE
"""Bytes. Smaller blocks are kept by malloc itself."""
WINDOW = 512
"""Requests after which the peak of memory in use is measured anew."""


class Pool:
    """Blocks of memory, reused once no tensor refers to them.

    It holds at most the recent peak of memory in use. Small tensors, and those on other devices
    than the CPU, are torch's.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finalizer may run inside `empty`
        self._idle: list[np.ndarray] = []
        self._in_use = 0
        self._most = self._most_before = 0
        self._requests = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised contiguous tensor."""
        elements = math.prod(shape)
        size = elements * dtype.itemsize
        if device.type != "cpu" or size < SMALLEST:
            return torch.empty(shape, dtype=dtype, device=device)
        block = self._take(size)
        view = block[:size].view()
        # `view` lives as long as the tensor's storage, whatever refers to that.
        weakref.finalize(view, self._give_back, block).atexit = False
        return torch.from_numpy(view).view(dtype).view(*shape)

    @property
    def held(self) -> int:
        """Bytes, both in use and idle."""
        with self._lock:
            return self._in_use + sum(block.nbytes for block in self._idle)

    def _take(self, size: int) -> np.ndarray:
        with self._lock:
            self._requests += 1
            if self._requests % WINDOW == 0:
                self._most_before, self._most = self._most, self._in_use
            fitting = [i for i, b in enumerate(self._idle) if size <= b.nbytes <= 2 * size]
            if fitting:
                block = self._idle.pop(min(fitting, key=lambda i: self._idle[i].nbytes))
            else:
                block = _map(math.ceil(size / HUGE_PAGE) * HUGE_PAGE)
            self._in_use += block.nbytes
            self._most = max(self._most, self._in_use)
            limit = max(self._most, self._most_before)
            while self._idle and self.held > limit:
                del self._idle[0]  # the longest idle
            return block

    def _give_back(self, block: np.ndarray) -> None:
        with self._lock:
            self._in_use -= block.nbytes
            self._idle.append(block)


def _map(size: int) -> np.ndarray:
    """New memory, in huge pages where the system has them."""
    # Private: a forked process gets a copy, and the mapping can have huge pages.
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    bytes_ = np.frombuffer(memory, dtype=np.uint8)
    start = -bytes_.ctypes.data % HUGE_PAGE
    return bytes_[start : start + size]


POOL = Pool()
