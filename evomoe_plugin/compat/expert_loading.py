"""Loading a checkpoint where experts are divided over processes: each reads its own rows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from fairseq.trainer import Trainer
from torch import Tensor

from evomoe_plugin.compat import expert_files
from evomoe_plugin.compat.divided_experts import Divided, divided
from evomoe_plugin.compat.expert_shards import MODEL, manifest_of
from evomoe_plugin.dispatch import expert_rows
from evomoe_plugin.options import OptionError


@contextlib.contextmanager
def loading(trainer: Trainer) -> Iterator[None]:
    """Inside, every process reads the checkpoint by itself, where experts are divided."""
    if divided(trainer) is None:
        yield
        return
    checkpoint = trainer.cfg.checkpoint
    before = checkpoint.load_checkpoint_on_all_dp_ranks
    checkpoint.load_checkpoint_on_all_dp_ranks = True
    token = expert_rows.source.set(None)
    try:
        yield
    finally:
        expert_rows.source.reset(token)
        checkpoint.load_checkpoint_on_all_dp_ranks = before


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
            if not entry.name.endswith(expert_files.FOLDER) or len(expert_files.tags(path)) < 2:
                continue
            with contextlib.suppress(OSError, RuntimeError, OptionError):
                # Mapped, so that nothing but the list is read.
                state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                manifest = manifest_of(state, path)
                expert_files.keep_only(path, [manifest.tag] if manifest else [])
