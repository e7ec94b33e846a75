"""Activation checkpointing under autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from fairseq.modules import checkpoint_activations

from evomoe_plugin.patches.patch import Patch, always, wrapping


def _checkpointed_forward(
    upstream: Callable, forward: Callable, offload_to_cpu: bool, *args: Any, **kwargs: Any
) -> Any:
    return upstream(_as_now(forward), offload_to_cpu, *args, **kwargs)


def _as_now(forward: Callable) -> Callable:
    """`forward` under the autocast state of this moment, whenever it is called."""
    wanted = [
        (kind, torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    ]
    if not wanted:
        return forward

    def under_autocast(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for kind, dtype in wanted:
                # Nothing is kept: the first time no gradients are recorded, the second they are.
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            return forward(*args, **kwargs)

    return under_autocast


PATCH = Patch(
    name="checkpoint-autocast",
    broken="with --checkpoint-activations the second forward pass is not in the precision of the "
    "first under autocast: gradients are of other numbers than the loss, also with --amp",
    upstream="fairseq/modules/checkpoint_activations.py: CheckpointFunction.backward",
    remove_when="fairseq saves the state of autocast as torch.utils.checkpoint does",
    needed=always("the matmul dtype may differ from that of the weights"),
    apply=wrapping(checkpoint_activations, _checkpointed_forward=_checkpointed_forward),
)
