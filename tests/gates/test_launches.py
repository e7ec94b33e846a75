"""A layer's forward and backward pass as on a GPU: how many kernels are launched."""

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton for this platform")

from tests.host_waits import pretend_a_gpu
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
