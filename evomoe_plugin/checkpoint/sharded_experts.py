"""Sharded experts as checkpoints see them: which layers have them, under which names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from evomoe_plugin.checkpoint.expert_shards import MODEL, manifest_of
from evomoe_plugin.checkpoint.optimizer_layout import OptimizerLayout
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.dispatch.process_groups import ExpertGroups
from evomoe_plugin.dispatch.sharded_layers import checkpoint_name, sharded_layers


@dataclass(frozen=True)
class ShardedExperts:
    """The layers of a model whose experts are sharded over ranks."""

    groups: ExpertGroups
    layers: dict[str, Any]
    """By their prefix in the checkpoint."""

    def names(self) -> dict[str, int]:
        """Names of the experts' parameters and buffers in the checkpoint, and their E."""
        return {
            f"{prefix}experts.{name}": layer.num_experts
            for prefix, layer in self.layers.items()
            for name in layer.expert_names
        }

    def unsharded(self, layout: OptimizerLayout) -> OptimizerLayout:
        """The layout with the shapes of all experts in place of this rank's."""
        counts = self.names()
        shapes = tuple(
            torch.Size([counts[name], *shape[1:]]) if name in counts else shape
            for name, shape in zip(layout.names, layout.shapes, strict=True)
        )
        return dataclasses.replace(layout, shapes=shapes)

    def own_moments(self, named: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """An optimizer's state by name, with this rank's rows in place of those of all experts."""
        counts = self.names()
        return {
            name: entry
            if name not in counts
            else {
                # Copies, so that those of all experts are not kept for them.
                key: value[self.groups.own(counts[name])].clone()
                if torch.is_tensor(value) and value.dim()
                else value
                for key, value in entry.items()
            }
            for name, entry in named.items()
        }

    def keep_own(self, model: dict[str, Any]) -> None:
        """Keep only this rank's rows of a whole model's state dict."""
        for name, count in self.names().items():
            model[name] = model[name][self.groups.own(count)]

    def check(self, state: Mapping[str, Any], path: str) -> None:
        """Raise `OptionError` unless the checkpoint, whose experts may lie in files of their own,
        has the same experts as the model."""
        manifest = manifest_of(state, path)
        if manifest is None:
            found = {
                name: len(state["model"][name]) for name in self.names() if name in state["model"]
            }
        else:
            found = {
                name: manifest.tensors[f"{MODEL}/{name}"].shape[0] for name in manifest.weights()
            }
        remedy = "give the architecture and options it was trained with"
        for name, count in self.names().items():
            if name not in found:
                raise OptionError("checkpoint", path, f"has no {name}: {remedy}")
            if found[name] != count:
                raise OptionError(
                    "checkpoint",
                    path,
                    f"has {found[name]} experts in {name}, the model {count}: {remedy}",
                )
        for name in sorted(found.keys() - self.names().keys()):
            raise OptionError("checkpoint", path, f"has {name}, the model has not: {remedy}")


def sharded_experts(trainer: Any) -> ShardedExperts | None:
    """None where every rank has all experts."""
    layers = sharded_layers(trainer.get_model())
    if not layers:
        return None
    return ShardedExperts(
        layers[0].groups,
        {
            checkpoint_name(f"{name}."): module
            for name, module in trainer.get_model().named_modules()
            if module in layers
        },
    )


def check_all_ranks_see(path: str, seen: Any) -> None:
    """Raise `OptionError` on all ranks unless all have `seen` the same under `path`."""
    found: list[Any] = [seen] * dist.get_world_size()
    dist.all_gather_object(found, seen)
    other = next((rank for rank, value in enumerate(found) if value != found[0]), None)
    if other is not None:
        raise OptionError(
            "checkpoint",
            path,
            f"rank {other} does not see what rank 0 does under "
            "this name: give a --save-dir, or a "
            "--restore-file, that all machines share",
        )
