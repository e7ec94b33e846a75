"""The tensors of a Hugging Face folder, read one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.hf_config import CONFIG, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# safetensors' names.
_FLOATS = ("F16", "BF16", "F32", "F64")


class HFTensors:
    """The tensors of model.safetensors, or of the files that its index names.

    Pickled weights, which could run a program, are not read.

    Args:
        option: what the user named the folder with, for messages.
        folder: the folder.
    Raises:
        OptionError: a file is missing, cut short or no safetensors, or two have the same tensor.
    """

    def __init__(self, option: str, folder: str):
        self._option, self._folder = option, folder
        self._files: dict[str, Any] = {}
        for part in self._parts():
            path = os.path.join(folder, part)
            if not os.path.isfile(path):
                raise OptionError(option, path, "there is no such file")
            try:
                file = safe_open(path, framework="pt")
                names = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise OptionError(
                    option, path, f"is no file of safetensors, or cut short ({error})"
                ) from error
            for name in names:
                if name in self._files:
                    raise self.misfit(f"two of its files have {name}")
                self._files[name] = file

    def misfit(self, why: str) -> OptionError:
        """An error that says what is wrong with the folder."""
        return OptionError(self._option, self._folder, why)

    def _parts(self) -> list[str]:
        folder = self._folder
        if os.path.isfile(os.path.join(folder, INDEX)):
            named = read_json(self._option, folder, INDEX).get("weight_map")
            if not isinstance(named, dict) or not all(isinstance(p, str) for p in named.values()):
                raise self.misfit(f"its {INDEX} has no weight_map of file names")
            if any(os.path.basename(part) != part for part in named.values()):
                raise self.misfit(f"its {INDEX} names files of other folders")
            return sorted(set(named.values()))
        if not os.path.isfile(os.path.join(folder, WEIGHTS)):
            raise self.misfit(
                f"has no {WEIGHTS}; pickled weights, which could run a program, are "
                "not read: save the model again with safe_serialization=True"
            )
        return [WEIGHTS]

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `OptionError` unless the tensor exists, in 16 bits or more and of this shape."""
        if name not in self._files:
            raise self.misfit(f"its weights have no {name}")
        header = self._files[name].get_slice(name)
        given = tuple(header.get_shape())
        if given != shape:
            raise self.misfit(f"{name} has the shape {given}, where {CONFIG} says {shape}")
        if header.get_dtype() not in _FLOATS:
            raise self.misfit(
                f"{name} is of the type {header.get_dtype()}: give weights of 16 or 32 bits, not "
                "quantised ones"
            )

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        return self._checked(name, lambda file: file.get_tensor(name).clone())

    def read_rows(self, name: str, rows: int) -> Iterator[tuple[int, Tensor]]:
        """The tensor, `rows` rows at a time, each with the number of the first."""
        total = self._files[name].get_slice(name).get_shape()[0]
        for start in range(0, total, rows):
            part = slice(start, min(start + rows, total))
            yield start, self._checked(name, lambda file: file.get_slice(name)[part])  # noqa: B023

    def _checked(self, name: str, read: Callable[[Any], Tensor]) -> Tensor:
        try:
            value = read(self._files[name])
        except SafetensorError as error:
            raise self.misfit(f"{name} cannot be read ({error})") from error
        if not torch.stack(value.aminmax()).isfinite().all():
            raise self.misfit(f"{name} holds NaN or infinity")
        return value
