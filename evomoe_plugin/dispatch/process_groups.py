"""Which processes hold which experts, and which hold the same ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch.distributed as dist

_divides: ContextVar[bool] = ContextVar("divides", default=True)


@dataclass(frozen=True)
class ExpertGroups:
    """This process's place among those that divide the experts between them.

    With W processes and R that divide the experts, ranks gR to gR + R - 1 hold one set of all
    experts, and ranks r, R + r, 2R + r, … hold the same ones.
    """

    size: int
    """R."""
    rank: int
    """This process's among the R; it holds the `rank`-th of R equal parts of every layer."""
    exchange: dist.ProcessGroup
    """The R processes that tokens travel between."""
    replicas: dist.ProcessGroup
    """The W / R processes with the same experts, whose gradients are averaged."""

    def own(self, num_experts: int) -> slice:
        """The experts of a layer with `num_experts` that this process holds."""
        count = num_experts // self.size
        return slice(self.rank * count, (self.rank + 1) * count)


_made: dict[tuple[dist.ProcessGroup, int], ExpertGroups] = {}


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Inside, models are built with all experts in this process, whatever their options say."""
    token = _divides.set(False)
    try:
        yield
    finally:
        _divides.reset(token)


def expert_groups(size: int) -> ExpertGroups | None:
    """The groups for experts divided over `size` processes; None where one process has all.

    All processes must call it alike. Without process groups one process has all experts, whatever
    the run that trained them did.

    Raises:
        ValueError: `size` does not divide the number of processes.
    """
    if size == 1 or not _divides.get():
        return None
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    key = dist.group.WORLD, size
    if key not in _made:
        _made.clear()  # groups of a world that was left, as between the runs of a sweep
        _made[key] = _make(size)
    return _made[key]


def _make(size: int) -> ExpertGroups:
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % size:
        raise ValueError(f"{world} processes cannot be divided into groups of {size}")
    # Every process takes part in making every group, and all in the same order.
    exchanges = [dist.new_group(list(range(start, start + size)))
                 for start in range(0, world, size)]
    replicas = [dist.new_group(list(range(place, world, size))) for place in range(size)]
    return ExpertGroups(size, rank % size, exchanges[rank // size], replicas[rank % size])
