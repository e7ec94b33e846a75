"""MoE layers whose experts are sharded over ranks, and the names of their parameters."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evomoe_plugin.dispatch.process_groups import ExpertGroups


def sharded_layers(model: nn.Module) -> list[Any]:
    """The MoE layers of `model` whose experts are sharded over ranks."""
    return [
        m
        for m in model.modules()
        if getattr(m, "groups", None) is not None and hasattr(m, "expert_names")
    ]


def expert_groups_of(model: nn.Module) -> ExpertGroups | None:
    """The ranks that the experts of `model` are sharded over; None: each has all."""
    return next((layer.groups for layer in sharded_layers(model)), None)


def is_expert_parameter(name: str) -> bool:
    """Whether a parameter, named as in the checkpoint, has a row for each routed expert."""
    return ".moe.experts." in name


def all_gather_rows(own: Tensor, groups: ExpertGroups) -> Tensor:
    """The rows of all experts, on each of the ranks that hold some; all must call it."""
    parts = [torch.empty_like(own) for _ in range(groups.size)]
    dist.all_gather(parts, own.contiguous(), group=groups.exchange)
    return torch.cat(parts)


# What wrappers such as FSDP put into names.
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_fpw_module|module)\.")


def checkpoint_name(name: str) -> str:
    """The name of a parameter or module in the checkpoint, without what wraps the modules."""
    return _WRAPPERS.sub("", name)
