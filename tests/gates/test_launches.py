"""A layer's forward and backward pass as on a GPU: how many kernels are launched."""

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton for this platform")

from torch.utils._python_dispatch import TorchDispatchMode

from tests.host_waits import HostWaits, pretend_a_gpu
from tests.launches import Launches

MOST = {"top_k": 40, "dense_to_sparse": 48}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there Triton has no interpreter")
@pytest.mark.parametrize("gate", MOST)
def test_a_layer_launches_few_kernels(make_layer, gate, monkeypatch):
    kernels = pretend_a_gpu(monkeypatch)
    layer = make_layer(moe_gate=gate, dtype=torch.float32)
    x = torch.randn(19, 6, requires_grad=True)
    keys, of_y, of_aux = torch.arange(19), torch.ones(19, 6), torch.ones(1)
    with Launches() as launches:
        y, aux, _ = layer(x, token_keys_T=keys)
        torch.autograd.backward([y, aux], [of_y, of_aux])
    total = launches.counts.total() + kernels.total()
    assert total <= MOST[gate]


class Calls(TorchDispatchMode):
    """All operators with the shapes of tensors and the numbers they are given."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = torch.utils._pytree.tree_leaves((args, kwargs))
        shapes = [(a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in given]
        self.found.append((str(function), shapes))
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there Triton has no interpreter")
@pytest.mark.parametrize("gate", MOST)
def test_steps_of_one_shape_are_the_same_launches(make_layer, gate, monkeypatch):
    """As a CUDA graph demands: they do not depend on values, and no value is read."""
    kernels = pretend_a_gpu(monkeypatch)
    layer = make_layer(moe_gate=gate, dtype=torch.float32)
    steps = []
    for factor in (0.1, 30.0):
        kernels.clear()
        x = (factor * torch.randn(19, 6)).requires_grad_()
        with Calls() as calls, HostWaits():
            y, aux, stats = layer(x, token_keys_T=torch.arange(19))
            (y.sum() + aux.sum()).backward()
        steps.append((calls.found, dict(kernels), float(stats["entropy"])))
        layer.zero_grad()
    (first, launched, entropy), (second, launched_too, entropy_too) = steps
    assert first == second and launched == launched_too
    assert entropy != entropy_too
