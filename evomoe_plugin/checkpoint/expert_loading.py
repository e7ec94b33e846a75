"""Loading a checkpoint where experts are divided over processes: each reads its own rows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from fairseq.trainer import Trainer
from torch import Tensor

from evomoe_plugin.checkpoint import expert_files
from evomoe_plugin.checkpoint.expert_shards import MODEL, manifest_of
from evomoe_plugin.checkpoint.sharded_experts import Divided, divided
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.dispatch import expert_rows
from evomoe_plugin.patches import checkpoint_reading


@contextlib.contextmanager
def loading(trainer: Trainer, path: str) -> Iterator[None]:
    """Inside, every process reads the checkpoint `path` by itself, where experts are divided.

    Raises:
        OptionError: not all processes see it, or they see different ones.
    """
    if divided(trainer) is None:
        yield
        return
    _check_same(path, os.path.isfile(path))
    checkpoint = trainer.cfg.checkpoint
    before = checkpoint.load_checkpoint_on_all_dp_ranks
    checkpoint.load_checkpoint_on_all_dp_ranks = True
    token = expert_rows.source.set(None)
    try:
        yield
    finally:
        expert_rows.source.reset(token)
        checkpoint.load_checkpoint_on_all_dp_ranks = before
    _check_same(path, [entry.get("num_updates") for entry in trainer._optim_history or ()])


def _check_same(path: str, seen: Any) -> None:
    """Raise `OptionError` on all processes unless all have seen the same."""
    found: list[Any] = [seen] * dist.get_world_size()
    dist.all_gather_object(found, seen)
    other = next((rank for rank, value in enumerate(found) if value != found[0]), None)
    if other is not None:
        raise OptionError("checkpoint", path, f"process {other} does not see what process 0 does "
                                              "under this name: give a --save-dir, or a "
                                              "--restore-file, that all machines share")


def check_experts(state: Mapping[str, Any], experts: Divided, path: str) -> None:
    """Raise `OptionError` unless the checkpoint, experts in its files or not, has those that the
    model has."""
    manifest = manifest_of(state, path)
    if manifest is None:
        found = {name: len(state["model"][name]) for name in experts.names()
                 if name in state["model"]}
    else:
        found = {name: manifest.tensors[f"{MODEL}/{name}"].shape[0]
                 for name in manifest.weights()}
    remedy = "give the architecture and options it was trained with"
    for name, count in experts.names().items():
        if name not in found:
            raise OptionError("checkpoint", path, f"has no {name}: {remedy}")
        if found[name] != count:
            raise OptionError("checkpoint", path, f"has {found[name]} experts in {name}, the "
                                                  f"model {count}: {remedy}")
    for name in sorted(found.keys() - experts.names().keys()):
        raise OptionError("checkpoint", path, f"has {name}, the model has not: {remedy}")


def take_experts_out(state: dict[str, Any], experts: Divided) -> None:
    """Keep weights of experts out of what fairseq sends around; layers ask for their own rows."""
    weights = {name: state["model"].pop(name) for name in experts.names()}
    own = {name: experts.groups.own(count) for name, count in experts.names().items()}

    def source(name: str, rows: slice) -> Tensor:
        weight = weights[name]
        held = rows.stop - rows.start
        return weight if len(weight) == held and own[name] == rows else weight[rows]

    expert_rows.source.set(source)


def remove_stale(folder: str) -> None:
    """Remove experts that a killed process wrote, or had not removed yet, beside checkpoints that
    name others."""
    with contextlib.suppress(FileNotFoundError):
        for entry in list(os.scandir(folder)):
            path = entry.path.removesuffix(expert_files.FOLDER) + ".pt"
            if not entry.name.endswith(expert_files.FOLDER):
                continue
            # Of what is not there, or cannot be read, nothing is removed.
            with contextlib.suppress(OSError, OptionError), open(path, "rb") as file:
                # Mapped, so that nothing but the list is read.
                state = checkpoint_reading.load(file, map_location="cpu", mapped=True)
                manifest = manifest_of(state, path)
                expert_files.keep_only(path, [manifest.tag] if manifest else [])
