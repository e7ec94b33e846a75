"""Fully sharded models with frozen parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fairscale
from fairscale.nn.data_parallel import fully_sharded_data_parallel as fsdp
from torch import nn

from evomoe_plugin.patches.patch import Patch, always, wrap


def _get_fsdp_instances(upstream: Callable, module: nn.Module, skip_empty: bool = False) -> Any:
    """`skip_empty` asks for the instances with optimizer state, which frozen ones have not."""
    instances = upstream(module, skip_empty)
    if not skip_empty:
        return instances
    return [instance for instance in instances if any(p.requires_grad for p in instance.params)]


def _rebuild_full_params(upstream: Callable, self: Any, force_full_precision: bool = False) -> Any:
    """Free what a frozen module's forward pass gathered: no backward pass has done so, and upstream
    expects it."""
    if (
        force_full_precision
        and self.has_full_params
        and (not any(p.requires_grad for p in self.params))
    ):
        self._free_full_params()
        self._use_fp32_param_shard()
    return upstream(self, force_full_precision)


def apply() -> None:
    wrap(fsdp, "get_fsdp_instances", _get_fsdp_instances)
    wrap(fsdp.FullyShardedDataParallel, "_rebuild_full_params", _rebuild_full_params)


PATCH = Patch(
    name="fsdp-frozen",
    broken="the optimizer's state of a fully sharded model with frozen parameters is taken for "
    "that of other parameters when it is gathered and sharded; saving right after an "
    "update ends in AssertionError: 0 vs. 1",
    upstream="fairscale/nn/data_parallel/fully_sharded_data_parallel.py: get_fsdp_instances, "
    "_rebuild_full_params",
    remove_when="training moves to torch's own fully_shard",
    needed=always(f"fairscale {fairscale.__version__}"),
    apply=apply,
)
