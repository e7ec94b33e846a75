"""Write weights as safetensors, one file or many, one of them in memory at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from evomoe_plugin.checkpoint.hf_tensors import INDEX, WEIGHTS
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.export.tokenizer import write_json

MAX_SHARD = "5GB"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Planned:
    """A tensor to write: its name, shape and dtype, and what makes it, in memory of its own."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, value: Tensor, dtype: torch.dtype) -> Planned:
        """A tensor in `dtype`, or in its own where that would change a value or it has integers.

        Args:
            value: may be a view of another one, and is not copied before it is written.
        """
        value = value.detach()
        if not value.is_floating_point() or not _fits(value, dtype):
            dtype = value.dtype

        def make() -> Tensor:
            return value.to(dtype, copy=True).contiguous()

        return cls(name, tuple(value.shape), dtype, make)

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def _fits(value: Tensor, dtype: torch.dtype) -> bool:
    return value.dtype == dtype or torch.equal(value.to(dtype).to(value.dtype), value)


def parse_size(option: str, text: str) -> int:
    """Bytes of "5GB", "200MB" or a number, in units of 1000.

    Raises:
        OptionError: it is no size, or 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]B)?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size < 1:
        raise OptionError(option, text, "give a size, such as 5GB or 200MB")
    return size


def write_shards(folder: Path, tensors: Iterable[Planned], max_bytes: int) -> None:
    """Write model.safetensors; or, if it would have more than `max_bytes`, several files of at most
    as many (a larger tensor is alone in one) and the index that transformers reads.

    Raises:
        OSError, SafetensorError: a file cannot be written.
    """
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    names = [WEIGHTS]
    if len(shards) > 1:
        stem, suffix = WEIGHTS.split(".")
        total = len(shards)
        names = [f"{stem}-{n:05}-of-{total:05}.{suffix}" for n in range(1, total + 1)]
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(t.num_bytes for shard in shards for t in shard)},
            "weight_map": {
                t.name: name for name, shard in zip(names, shards, strict=True) for t in shard
            },
        }
        write_json(folder / INDEX, index)
    for name, shard in zip(names, shards, strict=True):
        save_file({t.name: t.make() for t in shard}, folder / name, metadata={"format": "pt"})
