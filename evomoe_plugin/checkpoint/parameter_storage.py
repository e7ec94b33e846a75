"""Where a run stores its parameters and the optimizer's moments of them.

A parameter may be held once (fp32, memory-efficient half precision), twice (half precision with
fp32 masters, flat or one by one), or in shards on several ranks (FSDP, flat or one by one):
`trainer.layout.storages`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evomoe_plugin.checkpoint.row_shards import first_element, whole


@dataclass(frozen=True)
class Storage:
    """Parameters that the optimizer holds in one flat tensor, or this rank's shard of it."""

    owner: Any  # a Parameter, to which FSDP adds attributes
    """What the optimizer updates."""
    names: tuple[str, ...]
    """As in the checkpoint."""
    shapes: tuple[torch.Size, ...]
    copies: tuple[nn.Parameter, ...] = ()
    """The model's parameters where the owner is their master."""
    module: Any = None
    """fairscale's FSDP module of which the owner is a shard; else None."""
    parameter: Any = None
    """The parameter of torch's `fully_shard` of which the owner has this rank's rows; else None."""

    def pieces(self) -> Iterator[tuple[str, torch.Size, int, int]]:
        """Name, shape, begin and end of each parameter in the whole."""
        ends = accumulate(shape.numel() for shape in self.shapes)
        for name, shape, end in zip(self.names, self.shapes, ends, strict=True):
            yield name, shape, end - shape.numel(), end

    def gathered(self, own: Tensor) -> tuple[Tensor, int]:
        """The whole flat tensor of which `own` is this rank's shard, and the shard's offset in it.

        A collective of the ranks that the whole is sharded over.
        """
        if self.parameter is not None:
            return whole(own, self.parameter).view(-1), first_element(self.parameter)
        if self.module is None or not self.owner._is_sharded:
            return own, 0
        device, group = self.module.compute_device, self.module.process_group
        own = own.to(device)
        pieces = [torch.empty_like(own) for _ in range(self.module.world_size)]
        dist.all_gather(pieces, own, group=group)
        return torch.cat(pieces), self.module.rank * own.numel()

    def moments(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of the owner's optimizer state that have its number of elements."""
        own = self.owner.numel()
        return {
            key: value.view(-1)
            for key, value in state.items()
            if torch.is_tensor(value) and value.dim() and value.numel() == own
        }


def trained_parameters(trainer: Any) -> list[tuple[str, nn.Parameter]]:
    """The parameters of the optimizer that `trainer` builds without FSDP, by name, in its order."""
    parameters = [
        *trainer.get_model().named_parameters(),
        *((f"criterion.{n}", p) for n, p in trainer.get_criterion().named_parameters()),
    ]
    return [(name, p) for name, p in parameters if p.requires_grad]
