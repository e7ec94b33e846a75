"""What only a GPU shows of the kernels; the others' tests run on both (`test_fused.py`)."""

import logging

import pytest
import torch
from torch import nn

from evomoe_plugin.experts import ExpertFFN
from evomoe_plugin.experts.activations import find_activation
from evomoe_plugin.experts.kernels import cuda
from evomoe_plugin.experts.kernels.cpu.grouped import grouped_ffn
from evomoe_plugin.experts.kernels.cuda import grouped_mm
from tests.experts.one_by_one import oracle, tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

T, D, F, E = 64, 16, 32, 4


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("counts", [[40, 0, 24, 7], [0, 0, 0, 64], [0, 0, 0, 0], [1, 0, 0, 0]])
def test_chunks_of_experts_launched_apart_equal_one_by_one(counts, gated):
    weights = tensors(E, D, F, gated, not gated, torch.float64, "cuda")
    x = torch.randn(T, D, device="cuda", dtype=torch.float64).requires_grad_()
    token_ids = torch.cat([torch.arange(count) for count in counts]).long().cuda()
    row_weights = torch.rand(sum(counts), device="cuda", dtype=torch.float64).requires_grad_()
    got = grouped_ffn(
        x,
        weights,
        torch.tensor(counts, device="cuda"),
        find_activation(nn.functional.gelu),
        token_ids_N=token_ids,
        weights_N=row_weights,
    )
    wanted = oracle(x, weights, counts, nn.functional.gelu, token_ids, row_weights)
    leaves, seed = [x, row_weights, *weights.values()], torch.randn_like(got)
    gradients = torch.autograd.grad(got, leaves, seed)
    expected = torch.autograd.grad(wanted, leaves, seed)
    for a, b in zip([got, *gradients], [wanted, *expected], strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_another_activation_goes_through_the_grouped_product_and_is_compiled(monkeypatch):
    called = []
    real = grouped_mm.GroupedMMFFN.apply
    monkeypatch.setattr(
        grouped_mm.GroupedMMFFN, "apply", staticmethod(lambda *a: called.append(1) or real(*a))
    )
    experts = ExpertFFN(E, D, F, torch.sigmoid).cuda().bfloat16()
    experts.forward_rows(torch.randn(64, D, device="cuda", dtype=torch.bfloat16), [40, 0, 24, 0])
    assert called
    assert grouped_mm._fuses


def test_autocast_has_its_precision_and_leaves_gradients_in_fp32():
    experts = ExpertFFN(E, D, F, nn.functional.gelu).cuda()
    rows = torch.randn(64, D, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        got = experts.forward_rows(rows, [40, 0, 24, 0])
    wanted = experts.forward_rows(rows, [40, 0, 24, 0])
    assert got.dtype == torch.float32
    assert 0 < (got - wanted).abs().max() < 0.05
    got.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in experts.parameters())


def test_what_is_not_supported_is_said_once(caplog):
    cuda.say_once.cache_clear()
    experts = ExpertFFN(E, D, F, torch.sigmoid).cuda()
    rows = torch.randn(64, D, device="cuda")
    with caplog.at_level(logging.WARNING):
        experts.forward_rows(rows, [40, 0, 24, 0])
        experts.forward_rows(rows, [40, 0, 24, 0])
    assert sum("kernels of the experts are not used" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_gives_the_same_bits_again(dtype):
    E, D, F, T, K = 8, 128, 256, 4096, 3
    torch.manual_seed(0)
    experts = ExpertFFN(E, D, F, nn.functional.gelu).cuda().to(dtype)
    x = torch.randn(T, D, device="cuda").to(dtype).requires_grad_()
    mask_TE = torch.zeros(T, E, dtype=torch.bool, device="cuda").scatter_(
        1, torch.randn(T, E, device="cuda").topk(K, 1).indices, True
    )
    _, token_ids = mask_TE.t().nonzero(as_tuple=True)
    weights = torch.rand(T * K, device="cuda").requires_grad_()
    seed = torch.randn(T, D, device="cuda").to(dtype)

    def step():
        y = experts.forward_tokens(x, token_ids, weights, mask_TE.sum(0))
        return [y, *torch.autograd.grad(y, [x, weights, *experts.parameters()], seed)]

    first = step()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


def test_dropped_values_are_dropped_in_both_passes():
    experts = ExpertFFN(E, D, F, lambda h: h * 1, nn.Dropout(0.4), gated=True).cuda().bfloat16()
    with torch.no_grad():
        experts.fc1_weight.fill_(0.05)
    rows = torch.randn(256, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.manual_seed(1)
    got = experts.forward_rows(rows, [64] * E)
    # Quadratic in the row: by Euler's theorem both passes must use the same mask.
    (grad,) = torch.autograd.grad(got.float().sum(), rows)
    assert torch.allclose((grad.float() * rows).sum(), 2 * got.float().sum(), rtol=0.05, atol=2)
