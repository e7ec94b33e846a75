"""Editing parameters by name between updates, whichever way the run keeps them.

A parameter may be held once (fp32, memory-efficient half precision), twice (half precision with
fp32 masters, flat or one by one), or in pieces on all ranks (FSDP); and of experts a rank may hold
some only. What is edited is what the optimizer updates; half-precision copies follow, and moments
are edited and reset where asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evomoe_plugin.compat.expert_parallel import all_rows, dividing_groups, is_experts
from evomoe_plugin.compat.optimizer_layout import trained_parameters
from evomoe_plugin.compat.shards import flat_parameters

Edit = Callable[[Tensor], Tensor]
"""Changes a whole parameter, all experts', given in fp32, in place. Returns a bool mask that
broadcasts to its shape: the elements whose moments are reset."""

MomentEdit = Callable[[Tensor], None]
"""Changes a whole moment, of the parameter's shape and in its own precision, in place."""


@torch.no_grad()
def edit_parameters(
    trainer: Any, edits: Mapping[str, Edit], moment_edits: Mapping[str, MomentEdit] | None = None
) -> None:
    """Edit parameters, and set the optimizer's state of chosen elements to zero.

    All ranks must call it with the same edits; under FSDP they gather one flat parameter at a
    time, and of experts that are divided over ranks one parameter at a time. Moments are all state
    that has an element's place, as Adam's; counts of steps and Adafactor's sums over rows and
    columns stay.

    Args:
        trainer: fairseq's, between updates.
        edits: by the parameters' names in the checkpoint.
        moment_edits: for some of these names, what happens to each moment before any of it is
            reset.
    Raises:
        KeyError: a name is not that of a trained parameter.
    """
    optimizer = trainer.optimizer
    groups = dividing_groups(trainer.get_model())
    unknown = set(edits)
    for storage in _sharded(trainer) if trainer.is_fsdp else _whole(trainer, optimizer):
        wanted = [name for name in storage.names if name in edits]
        if wanted:
            unknown -= set(wanted)
            state = optimizer.optimizer.state.get(storage.owner, {})
            _edit_moments(storage, moment_edits or {}, state, groups)
            _edit_storage(storage, edits, state, groups)
    if unknown:
        raise KeyError(f"no trained parameter: {', '.join(sorted(unknown))}")


@dataclass(frozen=True)
class _Storage:
    """Parameters that the optimizer holds end to end in one tensor, or a rank's piece of it."""

    owner: nn.Parameter
    """What the optimizer updates."""
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    copies: tuple[nn.Parameter, ...] = ()
    """The model's parameters where the owner is their master."""
    module: Any = None
    """The FSDP module; None where the owner is the whole."""

    def pieces(self) -> Iterator[tuple[str, torch.Size, int, int]]:
        """Name, shape, begin and end of each parameter in the whole."""
        ends = accumulate(shape.numel() for shape in self.shapes)
        for name, shape, end in zip(self.names, self.shapes, ends, strict=True):
            yield name, shape, end - shape.numel(), end

    def gathered(self, own: Tensor) -> tuple[Tensor, int]:
        """The whole of what `own`, flat, is the owner's part of, and where that begins in it."""
        if self.module is None or not self.owner._is_sharded:
            return own, 0
        device, group = self.module.compute_device, self.module.process_group
        own = own.to(device)
        pieces = [torch.empty_like(own) for _ in range(self.module.world_size)]
        dist.all_gather(pieces, own, group=group)
        return torch.cat(pieces), self.module.rank * own.numel()


def _moments(storage: _Storage, state: Mapping[str, Any]) -> list[Tensor]:
    own = storage.owner.numel()
    return [value.view(-1) for value in state.values()
            if torch.is_tensor(value) and value.dim() and value.numel() == own]


def _edit_moments(
    storage: _Storage, edits: Mapping[str, MomentEdit], state: Mapping[str, Any], groups: Any
) -> None:
    if not any(name in edits for name in storage.names):
        return
    for own in _moments(storage, state):
        whole, start = storage.gathered(own)
        for name, shape, begin, end in storage.pieces():
            if name in edits:
                held = whole[begin:end].view(shape)
                value, rows = _all_experts(name, held, groups)
                edits[name](value)
                if value is not held:
                    held.copy_(value[rows])
        own.copy_(whole[start : start + own.numel()])


def _edit_storage(
    storage: _Storage, edits: Mapping[str, Edit], state: Mapping[str, Any], groups: Any
) -> None:
    own = storage.owner.data.view(-1)
    whole, start = storage.gathered(own)
    moments = _moments(storage, state)
    for i, (name, shape, begin, end) in enumerate(storage.pieces()):
        if name not in edits:
            continue
        # A copy in any case: what is held may be of less precision.
        value, rows = _all_experts(
            name, whole[begin:end].view(shape).to(torch.float32, copy=True), groups)
        reset = edits[name](value).expand(value.shape)[rows]
        value = value[rows]
        if storage.copies:
            storage.copies[i].data.copy_(value)
        low, high = max(begin, start), min(end, start + own.numel())
        if low >= high:  # lies on other ranks
            continue
        own[low - start : high - start].copy_(value.reshape(-1)[low - begin : high - begin])
        reset = reset.reshape(-1)[low - begin : high - begin]
        for moment in moments:
            moment[low - start : high - start].masked_fill_(reset.to(moment.device), 0)
    if storage.module is not None and storage.module.has_full_params:
        storage.module._free_full_params()  # they are of before


def _all_experts(name: str, held: Tensor, groups: Any) -> tuple[Tensor, slice]:
    """The rows of all experts, and where those that are held here lie in them."""
    if groups is None or not is_experts(name):
        return held, slice(None)
    rows = slice(groups.rank * held.size(0), (groups.rank + 1) * held.size(0))
    return all_rows(held, groups), rows


def _whole(trainer: Any, optimizer: Any) -> Iterator[_Storage]:
    """Without FSDP."""
    parameters = trained_parameters(trainer)
    masters = getattr(optimizer, "fp32_params", None)
    if isinstance(masters, dict):  # by device
        if len(masters) > 1:
            raise NotImplementedError("parameters cannot be edited with pipeline parallelism")
        yield _Storage(
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
            yield _Storage(p, (name,), (p.shape,))
        else:
            yield _Storage(master, (name,), (p.shape,), copies=(p,))


def _sharded(trainer: Any) -> Iterator[_Storage]:
    from fairscale.nn.data_parallel.fully_sharded_data_parallel import get_fsdp_instances

    owners = [(p, module) for module in get_fsdp_instances(trainer.model) for p in module.params]
    metadata = flat_parameters({"fsdp_metadata": trainer.model.local_metadata_dict()})
    for (owner, module), (path, _, parameter) in zip(owners, metadata, strict=True):
        prefix = f"{path}." if path else ""
        yield _Storage(
            owner,
            tuple(prefix + name for name in parameter["names"]),
            tuple(torch.Size(shape) for shape in parameter["shapes"]),
            module=module,
        )
