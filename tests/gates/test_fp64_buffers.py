"""fp64 buffers: exact in modules of any precision, values in state dicts."""

import copy

import pytest
import torch
from torch import nn

from evomoe_plugin.gates.fp64_buffers import fp64_buffer, register_fp64_buffer


def module(*values):
    inner = nn.Module()
    register_fp64_buffer(inner, "bias", torch.tensor(values, dtype=torch.float64))
    return nn.Sequential(inner)


def value(module):
    return fp64_buffer(module[0], "bias").tolist()


def test_state_dicts_hold_the_values():
    ours = module(4.001, -1e-17)
    state = ours.half().state_dict()
    assert list(state) == ["0.bias"] and state["0.bias"].tolist() == [4.001, -1e-17]
    other = module(0, 0).half()
    other.load_state_dict(state)
    assert value(other) == [4.001, -1e-17]
    assert list(state) == ["0.bias"]  # as it was given


def test_a_state_dict_is_a_view_and_follows_a_copy_of_the_module():
    """As those of other buffers: a moving average of the weights changes them in place."""
    ours = module(1, 2)
    other = copy.deepcopy(ours)
    other.state_dict()["0.bias"].mul_(0.5)
    assert value(other) == [0.5, 1] and value(ours) == [1, 2]


def test_values_may_have_been_cast_elsewhere():
    ours = module(0, 0)
    ours.load_state_dict({"0.bias": torch.tensor([0.5, 3.0], dtype=torch.float16)})
    assert value(ours) == [0.5, 3.0]


def test_earlier_state_dicts_hold_the_bits():
    ours = module(0, 0)
    bits = torch.tensor([4.001, -2], dtype=torch.float64).view(torch.int64)
    ours.load_state_dict({"0.bias_bits": bits})
    assert value(ours) == [4.001, -2]
    other = torch.tensor([-0.01, -1], dtype=torch.float64).view(torch.int64)
    with pytest.raises(RuntimeError, match=r"0\.bias_bits are no bits of fp64 values, .*average"):
        ours.load_state_dict({"0.bias_bits": (bits + other) // 2})
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict({})


def test_averages_of_state_dicts_are_averages():
    """As fairseq's scripts/average_checkpoints.py: sums, then divided, of integers rounded."""
    one, other = module(1.5, -2).state_dict(), module(0.5, 7).state_dict()
    (key,) = one
    total = one[key].clone()
    total += other[key]
    assert total.is_floating_point()
    ours = module(0, 0)
    ours.load_state_dict({key: total.div_(2)})
    assert value(ours) == [1, 2.5]
