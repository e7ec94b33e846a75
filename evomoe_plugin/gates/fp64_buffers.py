"""fp64 buffers that keep their precision in every run.

Half precision and FSDP with mixed precision cast floating-point buffers: a bias that changes by
0.001 per update would not change at all. A module therefore holds the bits of the fp64 values in
an integer buffer. State dicts hold the values, which other programs average, inspect and copy.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Averages of the bits of numbers of different signs are huge; values here are small.
_LARGEST = 1e15


def register_fp64_buffer(module: nn.Module, name: str, value: Tensor) -> None:
    """Register the buffer `NAME_bits` of `module` with `value`, in state dicts as `NAME`, fp64."""
    module.register_buffer(f"{name}_bits", value.to(torch.float64).view(torch.int64))
    module.register_state_dict_post_hook(partial(_values_from_bits, name))
    module.register_load_state_dict_pre_hook(partial(_bits_from_values, name))


def fp64_buffer(module: nn.Module, name: str) -> Tensor:
    """The value, fp64: a view, for changes in place."""
    return getattr(module, f"{name}_bits").view(torch.float64)


def _values_from_bits(
    name: str, _module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any
) -> None:
    state[prefix + name] = state.pop(f"{prefix}{name}_bits").view(torch.float64)


def _bits_from_values(
    name: str,
    _module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    _metadata: Any,
    _strict: bool,
    _missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    """Also of state dicts that hold the bits, as earlier checkpoints do."""
    key = prefix + name
    if key in state:
        state[f"{key}_bits"] = state.pop(key).to(torch.float64).view(torch.int64)
    elif f"{key}_bits" in state:
        value = state[f"{key}_bits"].view(torch.float64)
        if not bool((value.abs() <= _LARGEST).all()):
            errors.append(
                f"{key}_bits are no bits of fp64 values, as after averaging checkpoints of an "
                "earlier version: resume each and save it again, then average"
            )
