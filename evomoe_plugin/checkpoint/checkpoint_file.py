"""A checkpoint's main file, without the expert files beside it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evomoe_plugin.checkpoint import fsdp_shards
from evomoe_plugin.checkpoint.expert_shards import (
    MODEL,
    ExpertShards,
    Manifest,
    Whole,
    manifest_of,
    merge,
)
from evomoe_plugin.checkpoint.load import load_file
from evomoe_plugin.checkpoint.reading import existing_file
from evomoe_plugin.checkpoint.tensor_files import dtype_name
from evomoe_plugin.config.errors import OptionError


@dataclass(frozen=True)
class MainFile:
    """The content of a main file; tensors are memory-mapped."""

    path: str
    state: dict[str, Any]
    manifest: Manifest | None
    """The list of expert files beside it, if there are any."""

    @property
    def update(self) -> int:
        """The run's update when it was written."""
        return self.state["optimizer_history"][-1]["num_updates"]

    def option(self, group: str, name: str) -> Any:
        """One of the run's options; None if it had no such."""
        found = self.state.get("cfg") or {}
        for part in (group, name):
            found = found.get(part) if isinstance(found, Mapping) else getattr(found, part, None)
            if found is None:
                return None
        return found

    def weights(self) -> dict[str, Whole]:
        """Shapes and dtypes of parameters and buffers, those of all ranks' experts included."""
        found = {
            name: Whole(list(value.shape), dtype_name(value.dtype))
            for name, value in self.state["model"].items()
        }
        if self.manifest is not None:
            found |= {
                name: self.manifest.tensors[f"{MODEL}/{name}"] for name in self.manifest.weights()
            }
        return found

    def whole(self) -> dict[str, Any]:
        """The state with all experts in it, all of it in memory."""
        state = dict(self.state, model=copy.copy(self.state["model"]))
        optimizer = state.get("last_optimizer_state")
        if optimizer:
            state["last_optimizer_state"] = dict(optimizer, state=dict(optimizer["state"]))
        if self.manifest is not None:
            merge(state, ExpertShards(self.path, self.manifest))
        return state


def read_main_file(option: str, path: str, tensors: bool = True) -> MainFile:
    """Read a checkpoint of ours; FSDP shards are consolidated.

    Args:
        option: what the user named the file with, for messages.
        tensors: whether values of tensors are used; else their checksums are not verified.
    Raises:
        OptionError: no such file, cut short, altered, or not one of a run.
    """

    def load(file: str) -> dict[str, Any]:
        with open(file, "rb") as opened:
            return load_file(opened, map_location="cpu", mapped=True, tensors=tensors)

    try:
        file = existing_file(option, path)
        is_shard = fsdp_shards.SHARD.search(file)
        state = fsdp_shards.consolidated(file, load) if is_shard else load(file)
        if not state.get("optimizer_history"):
            raise OptionError(option, path, "is no checkpoint of a run: it has no history")
        return MainFile(path, state, manifest_of(state, path))
    except OptionError as error:
        raise OptionError(option, path, error.arguments[2]) from error
    except OSError as error:
        raise OptionError(option, path, f"cannot be read: {error.strerror or error}") from error
