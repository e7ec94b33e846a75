"""Which layers' experts are divided over processes, and by what names a checkpoint has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.trainer import Trainer

from evomoe_plugin.checkpoint.optimizer_layout import OptimizerLayout
from evomoe_plugin.dispatch import expert_rows
from evomoe_plugin.dispatch.process_groups import ExpertGroups
from evomoe_plugin.dispatch.sharded_layers import sharded_layers


@dataclass(frozen=True)
class Divided:
    """The layers of a model whose experts are divided over processes."""

    groups: ExpertGroups
    layers: dict[str, Any]
    """By their prefix in the checkpoint."""

    def names(self) -> dict[str, int]:
        """Names of the experts' parameters and buffers in the checkpoint, and their E."""
        return {f"{prefix}experts.{name}": layer.num_experts
                for prefix, layer in self.layers.items() for name in layer.expert_names}

    def undivided(self, layout: OptimizerLayout) -> OptimizerLayout:
        """The layout with the shapes of all experts in place of own ones."""
        counts = self.names()
        shapes = tuple(
            torch.Size([counts[name], *shape[1:]]) if name in counts else shape
            for name, shape in zip(layout.names, layout.shapes, strict=True))
        return dataclasses.replace(layout, shapes=shapes)

    def own_moments(self, named: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """An optimizer's state by name, with own rows in place of those of all experts."""
        counts = self.names()
        return {
            name: entry if name not in counts else {
                # Copies, so that those of all experts are not kept for them.
                key: value[self.groups.own(counts[name])].clone()
                if torch.is_tensor(value) and value.dim() else value
                for key, value in entry.items()}
            for name, entry in named.items()}


def divided(trainer: Trainer) -> Divided | None:
    """None where every process has all experts."""
    layers = sharded_layers(trainer.get_model())
    if not layers:
        return None
    return Divided(layers[0].groups, {
        expert_rows.plain_name(f"{name}."): module
        for name, module in trainer.get_model().named_modules() if module in layers})
