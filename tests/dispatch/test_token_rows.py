"""Rows of pairs and sums over tokens in Triton's kernel, against torch's operators."""

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton for this platform")

from evomoe_plugin.dispatch.token_rows import TokenRows
from evomoe_plugin.experts.kernels.cuda.combine import sort_by_token
from evomoe_plugin.routing import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, D = 5, 3
TOKEN_IDS = {
    "in any order": [3, 0, 3, 4, 0, 3],  # tokens 1 and 2 have no pair
    "one": [2],
    "none": [],
}


@pytest.mark.parametrize("given", [True, False], ids=["known order", "sorted here"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", TOKEN_IDS.values(), ids=TOKEN_IDS)
def test_kernels_equal_operators(ids, dtype, given, monkeypatch):
    token_ids = torch.tensor(ids, dtype=torch.int64, device=DEVICE)
    x = torch.randn(T, D, device=DEVICE).to(dtype).requires_grad_()
    weights = torch.rand(len(ids), device=DEVICE).requires_grad_()
    results = []
    for usable in (True, False):
        monkeypatch.setattr(kernels, "usable", lambda _, usable=usable: usable)
        order = sort_by_token(token_ids, T) if given else None
        pairs = TokenRows(token_ids, T, order)
        rows = pairs.take(x)
        y = pairs.sum(rows * 2, weights, dtype)
        assert y.dtype == dtype and rows.shape == (len(ids), D)
        gradients = torch.autograd.grad(y.float().square().sum(), [x, weights])
        results.append([rows, y, *gradients])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(
            got, wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )


def test_weights_that_need_no_gradient(monkeypatch):
    monkeypatch.setattr(kernels, "usable", lambda _: True)
    pairs = TokenRows(torch.tensor([1, 0], device=DEVICE), 2)
    rows = torch.ones(2, D, device=DEVICE, requires_grad=True)
    pairs.sum(rows, torch.tensor([2.0, 3.0], device=DEVICE), torch.float32).sum().backward()
    assert rows.grad.tolist() == [[2.0] * D, [3.0] * D]
