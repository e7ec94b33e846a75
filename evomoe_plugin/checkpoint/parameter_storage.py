"""Where a run stores its parameters and the optimizer's moments of them.

A parameter may be held once (fp32, memory-efficient half precision), twice (half precision with
fp32 masters, flat or one by one), or in shards on several ranks (FSDP, flat or one by one).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evomoe_plugin.checkpoint.fsdp_shards import flat_parameters
from evomoe_plugin.checkpoint.optimizer_layout import OptimizerLayout
from evomoe_plugin.checkpoint.row_shards import first_element, free_whole, own_rows, whole


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


def storages(trainer: Any) -> Iterator[Storage]:
    """All storages of what `trainer` trains, and under FSDP of what is frozen; in the same order on
    all ranks."""
    if trainer.is_fsdp2:
        return _rows(trainer)
    return _sharded(trainer) if trainer.is_fsdp else _whole(trainer)


def _whole(trainer: Any) -> Iterator[Storage]:
    """Without FSDP."""
    parameters = trained_parameters(trainer)
    masters = getattr(trainer.optimizer, "fp32_params", None)
    if isinstance(masters, dict):  # by device
        if len(masters) > 1:
            raise NotImplementedError("parameters cannot be found with pipeline parallelism")
        yield Storage(
            next(iter(masters.values())),
            tuple(name for name, _ in parameters),
            tuple(p.shape for _, p in parameters),
            copies=tuple(p for _, p in parameters),
        )
        return
    if masters is None:
        masters = [None] * len(parameters)
    for (name, p), master in zip(parameters, masters, strict=True):
        if master is None:
            yield Storage(p, (name,), (p.shape,))
        else:
            yield Storage(master, (name,), (p.shape,), copies=(p,))


def _rows(trainer: Any) -> Iterator[Storage]:
    free_whole(trainer.model)
    rows = iter(trainer.optimizer.params)
    for name, p in trainer.get_model().named_parameters():
        owner = next(rows) if p.requires_grad else own_rows(p)
        yield Storage(owner, (name,), (p.shape,), parameter=p)


def _sharded(trainer: Any) -> Iterator[Storage]:
    from fairscale.nn.data_parallel.fully_sharded_data_parallel import get_fsdp_instances

    owners = [(p, module) for module in get_fsdp_instances(trainer.model) for p in module.params]
    metadata = flat_parameters({"fsdp_metadata": trainer.model.local_metadata_dict()})
    for (owner, module), (path, _, parameter) in zip(owners, metadata, strict=True):
        prefix = f"{path}." if path else ""
        yield Storage(
            owner,
            tuple(prefix + name for name in parameter["names"]),
            tuple(torch.Size(shape) for shape in parameter["shapes"]),
            module=module,
        )


def fp32_masters(trainer: Any) -> dict[str, Tensor]:
    """The fp32 masters of parameters in half precision, by their names in the checkpoint; views.
    None under FSDP, whose own shards are in fp32."""
    found: dict[str, Tensor] = {}
    if trainer.is_fsdp or trainer.is_fsdp2:
        return found
    for storage in storages(trainer):
        if storage.copies:
            flat = storage.owner.data.view(-1)
            for name, shape, begin, end in storage.pieces():
                found[name] = flat[begin:end].view(shape)
    return found


def trained_parameters(trainer: Any) -> list[tuple[str, nn.Parameter]]:
    """The parameters of the optimizer that `trainer` builds without FSDP, by name, in its order."""
    parameters = [
        *trainer.get_model().named_parameters(),
        *((f"criterion.{n}", p) for n, p in trainer.get_criterion().named_parameters()),
    ]
    return [(name, p) for name, p in parameters if p.requires_grad]


def model_layout(trainer: Any) -> OptimizerLayout:
    """The layout of the optimizer that `trainer` builds."""
    if trainer.is_fsdp:
        kept = [storage for storage in _sharded(trainer) if storage.owner.requires_grad]
        return OptimizerLayout(
            tuple(name for storage in kept for name in storage.names),
            tuple(shape for storage in kept for shape in storage.shapes),
            tuple(n for n, storage in enumerate(kept) for _ in storage.names),
        )
    parameters, common = trained_parameters(trainer), trainer.cfg.common
    return OptimizerLayout(
        tuple(name for name, _ in parameters),
        tuple(p.shape for _, p in parameters),
        is_flat=common.fp16
        and not trainer.is_fsdp2
        and not common.memory_efficient_fp16
        and not common.fp16_no_flatten_grads,
    )
