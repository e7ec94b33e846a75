"""Forward passes in step, of ranks that shard experts and do not have equally many batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from evomoe_plugin.dispatch.sharded_layers import sharded_layers


@contextlib.contextmanager
def joined_forwards(model: nn.Module, idle: Callable[[], Any]) -> Iterator[None]:
    """Inside, each rank may run `model` as often as its own data takes, in inference.

    In every forward pass the ranks exchange rows, so all of them must make it. They announce each
    by a sum over the ranks; on exit, a rank takes part in those of the others by `idle` until none
    announces one. An exception ends this rank without waiting for the others.

    Args:
        model: all ranks must enter with it alike; without sharded experts this does nothing.
        idle: makes one forward pass, on a small input whose output does not matter.
    """
    layers = sharded_layers(model)
    if not layers:
        yield
        return
    first = layers[0]

    def passes(own: int) -> int:
        count = torch.tensor(own, device=first.num_updates.device)
        dist.all_reduce(count, group=first.groups.exchange)
        return int(count)

    def announce(*_: Any) -> None:
        passes(1)

    with first.register_forward_pre_hook(announce):
        yield
    while passes(0):
        idle()
