"""A decoder layer as torch.compile sees it on a GPU: one graph, forward and backward."""

import functools

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton for this platform")

from evomoe_plugin.models.attention import Mask
from tests.host_waits import pretend_a_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there Triton has no interpreter")
SLOW = pytest.mark.slow
OPTION = "allow_unspec_int_on_nn_module"  # docs/gpu.md
CASES = [
    {"moe_gate": "dense_to_sparse", "activation_dropout": 0.1},
    pytest.param({"moe_gate": "top_k", "moe_null_experts": 1}, marks=SLOW),
    pytest.param({"moe_gate": "switch", "moe_shared_experts": 1}, marks=SLOW),
    pytest.param({"moe_gate": "gshard", "moe_capacity_factor": 1.0}, marks=SLOW),
]


@pytest.mark.parametrize("given", CASES, ids=lambda given: given["moe_gate"])
def test_a_decoder_layer_is_one_graph(make_model, given, monkeypatch, request):
    from torch._dynamo import config
    from torch._dynamo.backends.debugging import aot_eager

    torch.compiler.reset()
    request.addfinalizer(functools.partial(setattr, config, OPTION, getattr(config, OPTION)))
    setattr(config, OPTION, True)
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    pretend_a_gpu(monkeypatch)
    layer = next(m for m in make_model(**given).modules() if hasattr(m, "moe")).train()
    x, keys = torch.randn(5, 2, 16, requires_grad=True), torch.arange(10).view(5, 2)
    compiled = torch.compile(layer, backend=counted, fullgraph=True)
    for update in range(4):
        layer.moe.set_num_updates(update)
        results = []
        for function in (layer, compiled):
            torch.manual_seed(update)
            y, aux, stats, _ = function(x, self_attn_mask=Mask.CAUSAL, token_keys=keys)
            gradients = torch.autograd.grad([y.sum(), aux.sum()], [x, *layer.parameters()])
            results.append([y, aux, *stats.values(), *gradients])
        for plain, as_graph in zip(*results, strict=True):
            torch.testing.assert_close(as_graph, plain)
    assert len(graphs) == 2  # of the first update, and of all others
