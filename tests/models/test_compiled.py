"""A decoder layer as torch.compile sees it on a GPU: one graph, forward and backward."""

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton for this platform")

from evomoe_plugin.models.attention import Mask
from tests.host_waits import pretend_a_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there Triton has no interpreter")
SLOW = pytest.mark.slow
CASES = [
    {"moe_gate": "dense_to_sparse", "activation_dropout": 0.1},
    pytest.param({"moe_gate": "top_k", "moe_null_experts": 1}, marks=SLOW),
    pytest.param({"moe_gate": "switch", "moe_shared_experts": 1}, marks=SLOW),
    pytest.param({"moe_gate": "gshard", "moe_capacity_factor": 1.0}, marks=SLOW),
]


@pytest.mark.parametrize("given", CASES, ids=lambda given: given["moe_gate"])
def test_a_decoder_layer_is_one_graph(make_model, given, monkeypatch):
    torch.compiler.reset()
    pretend_a_gpu(monkeypatch)
    layer = next(m for m in make_model(**given).modules() if hasattr(m, "moe")).train()
    x, keys = torch.randn(5, 2, 16, requires_grad=True), torch.arange(10).view(5, 2)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for function in (layer, compiled):
        torch.manual_seed(0)
        y, aux, stats, _ = function(x, self_attn_mask=Mask.CAUSAL, token_keys=keys)
        gradients = torch.autograd.grad([y.sum(), aux.sum()], [x, *layer.parameters()])
        results.append([y, aux, *stats.values(), *gradients])
    for plain, as_graph in zip(*results, strict=True):
        torch.testing.assert_close(as_graph, plain)
