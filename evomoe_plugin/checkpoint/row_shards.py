"""Parameters of torch's `fully_shard`, and tensors of their shapes: whole, and this rank's rows.

A parameter is a DTensor, sharded by its first dimension over the ranks of its mesh. The optimizer
sees this rank's rows as plain tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def own_rows(parameter: Tensor) -> Tensor:
    """This rank's rows of a parameter, a view; of one that is not sharded, itself."""
    value = parameter.detach()
    return value.to_local() if isinstance(value, DTensor) else value


def first_element(parameter: Tensor) -> int:
    """The offset of this rank's rows in the flattened whole."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh, (rows, *others) = parameter.device_mesh, parameter.shape
    before = mesh.get_local_rank() * -(-rows // mesh.size())  # rows are rounded up, as by chunk()
    return min(before, rows) * torch.Size(others).numel()


def rows_of(value: Tensor, parameter: Tensor) -> Tensor:
    """This rank's rows of a whole tensor that has the parameter's shape."""
    own, first = own_rows(parameter), first_element(parameter)
    return value.reshape(-1)[first : first + own.numel()].view(own.shape).to(own.device)


def whole(own: Tensor, parameter: Tensor) -> Tensor:
    """The whole of which each rank gives its rows; a collective of the parameter's mesh.

    Args:
        own: of this rank, as many elements as `own_rows(parameter)`.
        parameter: whose shape and sharding it has.
    """
    if not isinstance(parameter, DTensor):
        return own.view(parameter.shape)
    return gathered(distributed(own.view(own_rows(parameter).shape), parameter))


def gathered(value: Tensor) -> Tensor:
    """All rows of a sharded tensor, a collective of its mesh; a plain tensor itself."""
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    # Of uneven shards, a view of padded ones, all of which a file would hold.
    return full if full.untyped_storage().nbytes() == full.nbytes else full.clone()


def distributed(own: Tensor, parameter: DTensor) -> DTensor:
    """The rows of all ranks as one tensor, sharded as the parameter is."""
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=shape, stride=stride)


def free_whole(model: nn.Module) -> None:
    """Free what a forward pass gathered and left, so that the parameters are sharded ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def take_rows(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading a state dict of whole tensors: keep this rank's rows (a hook of modules)."""
    for name, parameter in module.named_parameters(recurse=False):
        value = state.get(prefix + name)
        # Of another shape: loading says so.
        if torch.is_tensor(value) and value.shape == parameter.shape:
            assert isinstance(parameter, DTensor)
            state[prefix + name] = distributed(rows_of(value, parameter), parameter)


def whole_state(model: nn.Module, on_this_rank: bool) -> dict[str, Any]:
    """The model's state dict with whole tensors on the CPU. A collective.

    Args:
        on_this_rank: whether it is kept here; else it is only gathered, one tensor at a time.
    """
    free_whole(model)
    # By parameter, since tied ones have several names.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[int, Tensor] = {}
    state = model.state_dict()
    for name in list(state):
        parameter = parameters.get(name)
        if not isinstance(parameter, DTensor):
            continue
        if id(parameter) not in found:
            value = gathered(parameter.detach())
            found[id(parameter)] = value.cpu() if on_this_rank else value.new_empty(0)
        state[name] = found[id(parameter)]
    return state


def whole_optimizer_state(
    state: dict[str, Any], parameters: Iterable[Tensor], on_this_rank: bool
) -> dict[str, Any]:
    """An optimizer's state dict with whole tensors on the CPU. A collective.

    Args:
        state: of this rank's rows, an entry for each parameter that has been updated.
        parameters: of the optimizer, in its order.
        on_this_rank: as `whole_state`.
    """
    entries: dict[int, dict[str, Any]] = {}
    for i, parameter in enumerate(parameters):
        entry = entries[i] = dict(state["state"].get(i, {}))
        for key, value in entry.items():
            if _is_elementwise(value, parameter):
                all_rows = whole(value, parameter)
                entry[key] = all_rows.cpu() if on_this_rank else None
    return {**state, "state": {i: entry for i, entry in entries.items() if entry}}


def own_optimizer_state(state: dict[str, Any], parameters: Iterable[Tensor]) -> dict[str, Any]:
    """This rank's part of an optimizer's state dict of whole tensors."""
    entries = {i: dict(entry) for i, entry in state["state"].items()}
    for i, parameter in enumerate(parameters):
        for key, value in entries.get(i, {}).items():
            if torch.is_tensor(value) and value.dim():
                entries[i][key] = rows_of(value, parameter).clone()  # not to keep the whole
    return {**state, "state": entries}


def _is_elementwise(value: Any, parameter: Tensor) -> bool:
    """Whether a value of the optimizer's has an element for each of this rank's."""
    return (
        torch.is_tensor(value) and value.dim() > 0 and value.numel() == own_rows(parameter).numel()
    )
