"""Which ranks hold which experts, and which hold the same ones."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class ExpertGroups:
    """This rank's place among those that shard the experts.

    With W ranks and R that shard the experts, ranks gR to gR + R - 1 hold one set of all experts,
    and ranks r, R + r, 2R + r, … hold the same ones.
    """

    size: int
    """R."""
    rank: int
    """This rank's index among the R; it holds the `rank`-th of R equal parts of every layer."""
    exchange: dist.ProcessGroup
    """The R ranks that tokens are exchanged between."""
    replicas: dist.ProcessGroup
    """The W / R ranks with the same experts, whose gradients are averaged."""

    def own(self, num_experts: int) -> slice:
        """The experts of a layer with `num_experts` that this rank holds."""
        count = num_experts // self.size
        return slice(self.rank * count, (self.rank + 1) * count)


def expert_groups(size: int) -> ExpertGroups | None:
    """The groups for experts sharded over `size` ranks; None where every rank has all.

    All ranks must call it alike. Without process groups one rank has all experts, whatever the run
    that trained them did.

    Raises:
        ValueError: `size` does not divide the number of ranks.
    """
    if size == 1 or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return _make(size, dist.group.WORLD)


@functools.lru_cache(maxsize=1)  # per world: each run of a sweep has its own
def _make(size: int, _world: dist.ProcessGroup | None) -> ExpertGroups:
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % size:
        raise ValueError(f"{world} ranks cannot be split into groups of {size}")
    # Every rank takes part in making every group, and all in the same order.
    exchanges = [dist.new_group(list(range(i, i + size))) for i in range(0, world, size)]
    replicas = [dist.new_group(list(range(i, world, size))) for i in range(size)]
    return ExpertGroups(size, rank % size, exchanges[rank // size], replicas[rank % size])
