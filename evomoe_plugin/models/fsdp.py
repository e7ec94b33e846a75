"""Wrapping of models in fairscale's FSDP."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from fairseq.distributed import fsdp_wrap
from fairseq.distributed.fully_sharded_data_parallel import FSDP, has_FSDP
from torch import nn


def wrap_experts(layer: Any) -> None:
    """Wrap sharded experts of an `MoELayer` in an FSDP instance of their own, if FSDP is used."""
    if layer.groups is not None:
        replicas = layer.groups.replicas
        layer.experts = fsdp_wrap(
            layer.experts, process_group=replicas, process_group_reduce_scatter=replicas
        )


@contextlib.contextmanager
def built_unwrapped(wanted: bool) -> Iterator[None]:
    """A context in which, if `wanted`, `fsdp_wrap` wraps nothing: parameters can be frozen by name
    only before they are flattened into one."""
    if not (wanted and is_wrapping()):
        yield
        return
    from fairscale.nn.wrap.auto_wrap import ConfigAutoWrap

    ConfigAutoWrap.in_autowrap_context = False
    try:
        yield
    finally:
        ConfigAutoWrap.in_autowrap_context = True


def is_wrapping() -> bool:
    """Whether `fsdp_wrap` wraps modules now."""
    if not has_FSDP:
        return False
    from fairscale.nn.wrap.auto_wrap import ConfigAutoWrap

    return ConfigAutoWrap.in_autowrap_context


def is_wrapped(module: nn.Module) -> bool:
    """Whether `module` is an FSDP instance."""
    return has_FSDP and isinstance(module, FSDP)
