"""Rewrite a checkpoint: experts in one file with the rest, or sharded over several."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from evomoe_plugin.checkpoint import checkpoint_files, expert_files
from evomoe_plugin.checkpoint.checkpoint_file import MainFile
from evomoe_plugin.checkpoint.expert_shards import (
    KEY,
    MODEL,
    OPTIMIZER,
    Entry,
    ExpertShards,
    Manifest,
    Whole,
    new_tag,
    replacing,
    write_shard,
)
from evomoe_plugin.checkpoint.optimizer_names import make_optimizer_plain, optimizer_names
from evomoe_plugin.checkpoint.output import check_output
from evomoe_plugin.checkpoint.tensor_files import dtype_name
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.dispatch.sharded_layers import is_expert_parameter


def check_checkpoint_output(option: str, path: str, overwrite: bool) -> None:
    """Raise `OptionError` unless a checkpoint can be written to `path`."""
    if not path.endswith(".pt"):
        raise OptionError(option, path, "give a name that ends with .pt")
    check_output(option, path, overwrite=overwrite)
    if not os.path.lexists(path) and expert_files.tags(path):
        raise OptionError(option, path, f"would take {expert_files.beside(path)}, which is there "
                                        "already: give another path, or move it away")


def consolidate(main: MainFile, out: str) -> None:
    """Write `main` with all experts to the one file `out`.

    Raises:
        OptionError: experts are missing or have changed.
        RunFailed: the disk is full or cannot be written.
    """
    state = main.whole()
    _make_plain(state)
    checkpoint_files.save(state, out)
    expert_files.keep_only(out, ())


def reshard(main: MainFile, out: str, size: int) -> None:
    """Write `main` to `out` with experts in `size` files beside it, one after the other.

    Raises:
        OptionError: it has no experts, or some that `size` does not divide; or as `consolidate`.
        RunFailed: the disk is full or cannot be written.
    """
    source = _Sharded(main) if main.manifest is not None else _InOneFile(main)
    if not source.tensors:
        raise OptionError("checkpoint", main.path, "has no experts")
    for key, whole in source.tensors.items():
        if whole.shape[0] % size:
            raise OptionError("size", size, f"does not divide the {whole.shape[0]} experts of "
                                            f"{key.partition('/')[2]}")
    tag = new_tag(main.update)
    with replacing(out, tag):
        files = []
        for rank in range(size):
            rows = {key: source.rows(key, _part(whole.shape[0], rank, size))
                    for key, whole in source.tensors.items()}
            files.append(write_shard(out, tag, rank, size, rows))
        manifest = Manifest(main.update, tag, source.tensors, source.optimizer, files)
        checkpoint_files.save({**source.rest, KEY: manifest.plain()}, out)


def _part(count: int, rank: int, size: int) -> slice:
    return slice(rank * count // size, (rank + 1) * count // size)


class _Sharded:
    """Experts that have files, read row by row."""

    def __init__(self, main: MainFile):
        self._shards = ExpertShards(main.path, main.manifest)
        self.tensors, self.optimizer = main.manifest.tensors, main.manifest.optimizer
        self.rest = main.state

    def rows(self, key: str, rows: slice) -> Tensor:
        return self._shards.rows(key, rows)


class _InOneFile:
    """Experts among the rest."""

    def __init__(self, main: MainFile):
        state = main.whole()
        _make_plain(state)
        self._values: dict[str, Tensor] = {}
        self.optimizer: dict[str, Entry] = {}
        names = [name for name in state["model"] if is_expert_parameter(name)]
        optimizer = state.get("last_optimizer_state")
        if optimizer:
            for i, name in enumerate(optimizer_names(main.path, state)):
                if name in names and i in optimizer["state"]:
                    self._take_entry(name, i, optimizer["state"].pop(i))
        weights = {f"{MODEL}/{name}": state["model"].pop(name) for name in names}
        self._values = {**weights, **self._values}
        self.tensors = {key: Whole(list(value.shape), dtype_name(value.dtype))
                        for key, value in self._values.items()}
        self.rest = state

    def _take_entry(self, name: str, index: int, entry: dict[str, Any]) -> None:
        values = {}
        for key, value in entry.items():
            if torch.is_tensor(value) and value.dim():
                self._values[f"{OPTIMIZER}/{name}/{key}"] = value
            else:
                values[key] = value.item() if torch.is_tensor(value) else value
        self.optimizer[name] = Entry(index, values)

    def rows(self, key: str, rows: slice) -> Tensor:
        return self._values[key][rows]


def _make_plain(state: dict[str, Any]) -> None:
    """As a run without FSDP writes it, which every run can read."""
    if state.get("last_optimizer_state"):
        make_optimizer_plain(state)
        optimizer = dict(state["last_optimizer_state"])
        state["last_optimizer_state"] = dict(optimizer, state=dict(optimizer["state"]))
    state.pop("fsdp_metadata", None)
