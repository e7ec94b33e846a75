"""The kernel that differentiates logits in place against torch's operators, on a GPU or in Triton's
interpreter."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="there is no Triton for this platform")

from evomoe_plugin.models import vocabulary_kernel
from evomoe_plugin.models.vocabulary_kernel import differentiate_
from evomoe_plugin.models.vocabulary_loss import smoothed_vocabulary_loss
from evomoe_plugin.routing import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAD = 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduce", [True, False])
def test_the_loss_is_the_same(reduce, smoothing, monkeypatch):
    x = torch.randn(7, 8, device=DEVICE).requires_grad_()
    weight = torch.randn(19, 8, device=DEVICE).requires_grad_()
    bias = torch.randn(19, device=DEVICE).requires_grad_()
    targets = torch.tensor([2, 5, PAD, 18, 3, 0, 7], device=DEVICE)
    monkeypatch.setattr(vocabulary_kernel, "_BLOCK", 8)
    results = []
    for usable in (True, False):
        monkeypatch.setattr(kernels, "usable", lambda _, usable=usable: usable)
        losses = smoothed_vocabulary_loss(x, weight, targets, PAD, 4, reduce, bias, smoothing)
        each = torch.linspace(0.5, 2, losses[0].numel(), device=DEVICE).view_as(losses[0])
        gradients = torch.autograd.grad(losses[0], (x, weight, bias), each)
        results.append([*(loss.detach() for loss in losses), *gradients])
    for in_one_pass, by_operators in zip(*results, strict=True):
        torch.testing.assert_close(in_one_pass, by_operators, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits(dtype, monkeypatch):
    """Certain, impossible and masked entries; the gradient of a certain target is not rounded to
    0 before it is scaled."""
    logits = torch.zeros(4, 11, device=DEVICE)
    logits[0, 3], logits[1, 3], logits[2, :9] = 10.0, -300.0, -torch.inf
    logits[3] = torch.linspace(-5, 9, 11)
    logits = logits.to(dtype)
    targets = torch.tensor([3, 3, 9, 10], device=DEVICE)
    exact = logits.double().requires_grad_()
    loss = F.cross_entropy(exact, targets, reduction="none")
    (wanted,) = torch.autograd.grad(loss.sum(), exact)
    monkeypatch.setattr(vocabulary_kernel, "_BLOCK", 4)
    smoothed, plain = differentiate_(logits, targets, 0.0, 0.0)
    torch.testing.assert_close(plain.double(), loss.detach(), rtol=1e-6, atol=2e-7)
    assert torch.equal(smoothed, plain)
    close = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(logits.double(), wanted, rtol=close, atol=1e-7)
