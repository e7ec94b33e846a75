"""Ranks that make different numbers of forward passes, each of which takes all of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from evomoe_plugin.dispatch.joined_forwards import joined_forwards
from evomoe_plugin.dispatch.process_groups import expert_groups
from tests.dispatch.test_expert_parallel import on_ranks


class Exchanging(nn.Module):
    """A layer whose forward pass waits for all ranks that shard its experts."""

    expert_names = ()

    def __init__(self, groups):
        super().__init__()
        self.groups = groups
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.passes = 0

    def forward(self, value):
        total = torch.tensor(value)
        dist.all_reduce(total, group=self.groups.exchange)
        self.passes += 1
        return int(total)


def check(rank: int, passes: list[int], size: int) -> None:
    groups = expert_groups(size)
    model = nn.Sequential(Exchanging(groups), nn.Identity(), Exchanging(groups))
    group = [rank // size * size + i for i in range(size)]
    found = []

    def run(value):
        found.append([layer(value) for layer in model if isinstance(layer, Exchanging)])

    for _ in range(2):  # nothing stays behind
        found.clear()
        with joined_forwards(model, lambda: run(0)):
            for _ in range(passes[rank]):
                run(1)
        rounds = max(passes[r] for r in group)
        wanted = [sum(n < passes[r] for r in group) for n in range(rounds)]
        assert found == [[count, count] for count in wanted], found
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize(
    "passes, size",
    [
        ([0, 3], 2),
        pytest.param([0, 0], 2, marks=pytest.mark.slow),
        pytest.param([2, 5, 1, 0], 2, marks=pytest.mark.slow),
        pytest.param([2, 5, 1, 0], 4, marks=pytest.mark.slow),
    ],
)
def test_each_rank_takes_part_in_the_passes_of_the_others(passes, size):
    on_ranks(len(passes), check, passes, size)


def test_without_sharded_experts_nothing_happens():
    with joined_forwards(nn.Linear(2, 2), lambda: pytest.fail("no rank waits")):
        pass
