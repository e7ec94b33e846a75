"""Fully sharded models with frozen parameters."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from evomoe_plugin.compat.mend import Mend, wrap


def needed() -> str | None:
    try:
        import fairscale
    except ImportError:
        return None
    return f"fairscale {fairscale.__version__}"


@contextlib.contextmanager
def built_unwrapped(wanted: bool) -> Iterator[None]:
    """Inside, if `wanted`, `fsdp_wrap` wraps nothing: parameters can be told apart by name, and
    frozen, only before they are flattened into one."""
    if not wanted or needed() is None:
        yield
        return
    from fairscale.nn.wrap.auto_wrap import ConfigAutoWrap

    before = ConfigAutoWrap.in_autowrap_context
    ConfigAutoWrap.in_autowrap_context = False
    try:
        yield
    finally:
        ConfigAutoWrap.in_autowrap_context = before


def is_wrapping() -> bool:
    """Whether `fsdp_wrap` wraps what it is given now."""
    if needed() is None:
        return False
    from fairscale.nn.wrap.auto_wrap import ConfigAutoWrap

    return ConfigAutoWrap.in_autowrap_context


def is_wrapped(module: nn.Module) -> bool:
    """Whether `module` is an FSDP instance."""
    if needed() is None:
        return False
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    return isinstance(module, FullyShardedDataParallel)


def _get_fsdp_instances(upstream: Callable, module: nn.Module, skip_empty: bool = False) -> Any:
    """With `skip_empty` it is asked for what the optimizer has state of: not for frozen ones."""
    instances = upstream(module, skip_empty)
    if not skip_empty:
        return instances
    return [instance for instance in instances if any(p.requires_grad for p in instance.params)]


def _rebuild_full_params(
    upstream: Callable, self: Any, force_full_precision: bool = False
) -> Any:
    """No backward pass of a frozen module frees what its forward pass gathered, and upstream then
    finds nothing to give to who asks for all of it."""
    if force_full_precision and self.has_full_params and (
            not any(p.requires_grad for p in self.params)):
        self._free_full_params()
        self._use_fp32_param_shard()
    return upstream(self, force_full_precision)


@functools.cache
def apply() -> None:
    from fairscale.nn.data_parallel import fully_sharded_data_parallel as fsdp

    wrap(fsdp, "get_fsdp_instances", _get_fsdp_instances)
    wrap(fsdp.FullyShardedDataParallel, "_rebuild_full_params", _rebuild_full_params)


MEND = Mend(
    name="fsdp-frozen",
    broken="the optimizer's state of a fully sharded model with frozen parameters is taken for "
           "that of other parameters when it is gathered and divided; saving right after an "
           "update ends in AssertionError: 0 vs. 1",
    upstream="fairscale/nn/data_parallel/fully_sharded_data_parallel.py: get_fsdp_instances, "
             "_rebuild_full_params",
    remove_when="training moves to torch's own fully_shard",
    needed=needed,
    apply=apply,
)
