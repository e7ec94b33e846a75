"""The profile of a step: operations of both passes are attributed to the part that called them."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import profile

FILE = Path(__file__).parents[2] / "benchmarks/profile_step.py"


@pytest.fixture(scope="module")
def profile_step():
    spec = importlib.util.spec_from_file_location("profile_step", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad @ torch.ones(64, 64)


def test_operations_of_both_passes_are_found(profile_step):
    attention, experts = nn.Linear(64, 64), nn.Linear(64, 64)
    attention.forward = profile_step.marked(attention.forward, "attention")
    experts.forward = profile_step.marked(experts.forward, "experts, other")
    norms = profile_step.marked(Twice.apply, "norms")

    def parts(of):
        with profile() as profiler:
            of(torch.randn(64, 64))
        return profile_step.by_part(list(profiler.events()), on_gpu=False)

    def both(x):
        attention(x).sum().backward()

    def experts_alone(x):
        experts(x).sum().backward()

    for of, part in (
        (both, "attention"),
        (experts_alone, "matmul"),
        (lambda x: norms(x.requires_grad_()).sum().backward(), "norms"),
    ):
        found = parts(of)
        others = {"attention", "matmul", "norms"} - {part}
        assert found[part] > 0 and not any(found[other] for other in others)
        assert found.keys() <= {*profile_step.PARTS}
