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
    new_tag,
    replacing,
    wholes,
    write_shard,
)
from evomoe_plugin.checkpoint.optimizer_names import make_plain, optimizer_names
from evomoe_plugin.checkpoint.output import check_output
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.dispatch.sharded_layers import is_expert_parameter


def check_checkpoint_output(option: str, path: str, overwrite: bool) -> None:
    """Raise `OptionError` unless a checkpoint can be written to `path`."""
    if not path.endswith(".pt"):
        raise OptionError(option, path, "give a name that ends with .pt")
    check_output(option, path, overwrite=overwrite)
    if not os.path.lexists(path) and expert_files.tags(path):
        raise OptionError(
            option,
            path,
            f"would take {expert_files.beside(path)}, which is there "
            "already: give another path, or move it away",
        )


def consolidate(main: MainFile, out: str) -> None:
    """Write `main` with all experts to the one file `out`.

    Raises:
        OptionError: experts are missing or have changed.
        RunFailed: the disk is full or cannot be written.
    """
    state = main.whole()
    make_plain(state)
    checkpoint_files.save(state, out)
    expert_files.keep_only(out, ())


def reshard(main: MainFile, out: str, size: int) -> None:
    """Write `main` to `out` with experts in `size` files beside it, one after the other.

    Raises:
        OptionError: it has no experts, or some that `size` does not divide; or as `consolidate`.
        RunFailed: the disk is full or cannot be written.
    """
    if main.manifest is None:
        shards, rest = None, main.whole()
        make_plain(rest)
        values, optimizer = _take_experts(main.path, rest)
        tensors = wholes(values, 1)
    else:
        shards, rest = ExpertShards(main.path, main.manifest), main.state
        tensors, optimizer = main.manifest.tensors, main.manifest.optimizer
    if not tensors:
        raise OptionError("checkpoint", main.path, "has no experts")
    for key, whole in tensors.items():
        if whole.shape[0] % size:
            raise OptionError(
                "size",
                size,
                f"does not divide the {whole.shape[0]} experts of {key.partition('/')[2]}",
            )
    tag = new_tag(main.update)
    with replacing(out, tag):
        files = []
        for rank in range(size):
            parts = {}
            for key, whole in tensors.items():
                count = whole.shape[0] // size
                rows = slice(rank * count, (rank + 1) * count)
                parts[key] = shards.rows(key, rows) if shards else values[key][rows]
            files.append(write_shard(out, tag, rank, size, parts))
        manifest = Manifest(main.update, tag, tensors, optimizer, files)
        checkpoint_files.save({**rest, KEY: manifest.plain()}, out)


def _take_experts(path: str, state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Entry]]:
    """Remove experts from the state; their tensors by a manifest's keys, and entries by name."""
    entries: dict[str, Entry] = {}
    optimizer = state.get("last_optimizer_state") or {"state": {}}
    order = optimizer_names(path, state) if optimizer["state"] else []
    names = [name for name in state["model"] if is_expert_parameter(name)]
    tensors = {f"{MODEL}/{name}": state["model"].pop(name) for name in names}
    for i, name in enumerate(order):
        if name in names and i in optimizer["state"]:
            entries[name] = Entry(i, {})
            for key, value in optimizer["state"].pop(i).items():
                if torch.is_tensor(value) and value.dim():
                    tensors[f"{OPTIMIZER}/{name}/{key}"] = value
                else:
                    entries[name].values[key] = value.item() if torch.is_tensor(value) else value
    return tensors, entries
