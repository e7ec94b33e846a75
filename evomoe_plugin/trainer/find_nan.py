"""Name the module in which NaN/Inf begins.

fairseq's NanDetector cannot: its hooks of the backward pass take the outputs of all modules for
tensors, and those of gates are routing plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evomoe_plugin.checkpoint.row_shards import own_rows


def first_not_finite(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """Where NaN/Inf begins when `run()` does forward and backward passes of `model`.

    Returns:
        The first module with it in an output, or else the first parameter with it in its gradient;
        None if there is none, since what it came from is not in the batches.
    """
    found: list[str] = []
    hooks = [
        module.register_forward_hook(partial(_look_at, name or "the model", found))
        for name, module in model.named_modules()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return f"the output of {found[0]}"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not own_rows(parameter.grad).isfinite().all():
            return f"the gradient of {name}"
    return None


def _look_at(name: str, found: list[str], _module: Any, _inputs: Any, outputs: Any) -> None:
    if not found and not all(bool(value.isfinite().all()) for value in _floats(outputs)):
        found.append(name)


def _floats(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in containers."""
    if torch.is_tensor(value):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _floats(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _floats(item)
