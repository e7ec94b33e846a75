"""Rows of parameters on one of two ranks, and whole tensors put together again."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from evomoe_plugin.checkpoint.row_shards import (
    first_element,
    own_optimizer_state,
    own_rows,
    rows_of,
    take_rows,
)


@pytest.fixture(params=[0, 1])
def rank(request):
    """This process's rank among two, whose collectives do nothing."""
    dist.init_process_group("fake", rank=request.param, world_size=2, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def sharded(value):
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    return nn.Parameter(distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None))


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_rows_of_each_rank(rank, rows):
    value = torch.arange(rows * 4.0).view(rows, 2, 2)
    parameter = sharded(value)
    wanted = (*value.chunk(2), value[:0])[rank]  # of one row, the second rank has none
    assert torch.equal(own_rows(parameter), wanted)
    assert first_element(parameter) == (0 if rank == 0 else 4 * -(-rows // 2))
    assert torch.equal(rows_of(-value, parameter), -wanted)
    own_rows(parameter).add_(1)  # a view
    assert torch.equal(parameter.to_local(), wanted + 1)


def test_loading_takes_the_rows(rank):
    module = nn.Linear(2, 3)
    for name in ("weight", "bias"):
        setattr(module, name, sharded(torch.zeros(getattr(module, name).shape)))
    module.register_load_state_dict_pre_hook(take_rows)
    state = {"weight": torch.arange(6.0).view(3, 2), "bias": torch.arange(3.0)}
    module.load_state_dict(state)
    assert torch.equal(own_rows(module.weight), state["weight"].chunk(2)[rank])
    with pytest.raises(RuntimeError, match=r"size mismatch for bias.*\[4\].*\[3\]"):
        module.load_state_dict({**state, "bias": torch.zeros(4)})


def test_moments_of_the_rows(rank):
    parameters = [sharded(torch.zeros(3, 2)), sharded(torch.zeros(3))]
    moment = torch.arange(6.0).view(3, 2)
    state = {"state": {0: {"step": 2, "exp_avg": moment}}, "param_groups": []}
    own = own_optimizer_state(state, parameters)
    assert own["state"][0]["step"] == 2 and own["state"].keys() == {0}
    assert torch.equal(own["state"][0]["exp_avg"], moment.chunk(2)[rank])
