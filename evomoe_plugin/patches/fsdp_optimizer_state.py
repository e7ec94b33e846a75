"""The optimizer's state of FSDP: gathered into one file, and loaded from shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fairscale
import torch
import torch.distributed as dist
from fairscale.nn.data_parallel import fsdp_optim_utils
from fairscale.nn.data_parallel import fully_sharded_data_parallel as fsdp

from evomoe_plugin.patches.patch import Patch, always, wrap


def _gather_optim_state(self: Any, states: dict[int, dict[str, Any]]) -> tuple[dict, dict]:
    """The shards of every state tensor, on rank 0; other ranks take part and get empty dicts.

    Returns:
        Per flat parameter and name: a list with each rank's shard; for other values, the value
        in a list of one. The second dict is the same for tensors without dimensions.
    """
    instances = fsdp.get_fsdp_instances(self, skip_empty=True)
    gathered: dict[int, dict[str, list]] = {i: {} for i in states}
    scalars: dict[int, dict[str, list]] = {i: {} for i in states}
    for i, state in states.items():
        for name, value in state.items():
            if not torch.is_tensor(value):
                if self.rank == 0:
                    gathered[i][name] = [value]
                continue
            value = value.to(self.compute_device)
            # A fresh buffer for each: upstream reuses one, which is right only where `.cpu()`
            # copies. On a CPU all tensors of a parameter would be the one gathered last.
            shards = [torch.empty_like(value) for _ in range(instances[i].world_size)]
            dist.all_gather(shards, value, group=instances[i].process_group)
            if self.rank == 0:
                target = scalars if value.dim() == 0 else gathered
                target[i][name] = [shard.cpu() for shard in shards]
    return gathered, scalars


def _remove_uncollectable(upstream: Callable, self: Any, given: dict[str, Any]) -> Any:
    # Upstream makes each `step` a number in place: a state dict's entries are the optimizer's own.
    given["state"] = {i: dict(state) for i, state in given["state"].items()}
    return upstream(self, given)


def _get_shard_from_optim_state_dict(self: Any, full: dict[str, Any]) -> dict[str, Any]:
    """This rank's part of a gathered state, sharded as each module is."""
    instances = fsdp.get_fsdp_instances(self, skip_empty=True)
    fsdp_optim_utils.check_param_counts_before_sharding(full, len(instances))
    whole = set(full["uncollected_local_ids"])
    if self.flatten_parameters:
        full = fsdp_optim_utils.flatten_optim_state_dict(full)
    for i, state in full["state"].items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.dim() and i not in whole:
                state[name], _ = instances[i]._get_shard(value)
            elif isinstance(value, list):  # a number of each rank; of fewer, perhaps
                state[name] = value[self.rank if self.rank < len(value) else 0]
    return full


def _load_local_state_dict(upstream: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    for module in fsdp.get_fsdp_instances(self):
        for parameter in module.params:
            module._init_param_attributes(parameter)
    return upstream(self, *args, **kwargs)


def apply() -> None:
    wrapped = fsdp.FullyShardedDataParallel
    wrapped._gather_optim_state = _gather_optim_state
    wrap(wrapped, "_remove_uncollectable_params_from_optim_state_dict", _remove_uncollectable)
    wrapped.get_shard_from_optim_state_dict = _get_shard_from_optim_state_dict
    wrap(wrapped, "load_local_state_dict", _load_local_state_dict)


PATCH = Patch(
    name="fsdp-optimizer-state",
    broken="on a CPU Adam's second moment is saved in place of the first, and a resumed run is "
    "silently wrong; with one rank saving ends in AttributeError: _full_param_padded, "
    "as does loading shards into nested FSDP, on any device; modules over fewer ranks "
    "than the whole get parts of another size; after a save Adadelta ends in RuntimeError: API "
    "has changed",
    upstream="fairscale/nn/data_parallel/fully_sharded_data_parallel.py: _gather_optim_state, "
    "_remove_uncollectable_params_from_optim_state_dict, get_shard_from_optim_state_dict, "
    "load_local_state_dict",
    remove_when="training moves to torch's own fully_shard",
    needed=always(f"fairscale {fairscale.__version__}"),
    apply=apply,
)
