"""The chunked loss against the one of all logits: values and gradients."""

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from torch.nn import functional as F

from evomoe_plugin.models.vocabulary_loss import smoothed_vocabulary_loss, vocabulary_loss

PAD = 1
# Of the largest value; half precision rounds logits and their gradients as the oracle does.
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def case(dtype=torch.float64, tokens=13, vocab=31, width=8):
    x = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width).to(dtype).requires_grad_()
    targets = torch.randint(2, vocab, (tokens,))
    targets[[3, tokens - 1]] = PAD
    return x, weight, targets


def oracle(x, weight, targets, reduce=True, bias=None):
    """As fairseq: logits of all tokens, their softmax in fp32 (fp64 for fp64)."""
    log_probs = F.log_softmax(
        F.linear(x, weight, bias), -1, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    return F.nll_loss(log_probs, targets, ignore_index=PAD, reduction="sum" if reduce else "none")


def assert_close(a, b, dtype):
    assert a.dtype == b.dtype
    largest = b.abs().max().item()
    torch.testing.assert_close(a, b, rtol=0, atol=CLOSE[dtype] * largest)


def assert_same(x, weight, targets, chunk, dtype, reduce=True, scale=1.0):
    results = []
    for loss in (
        vocabulary_loss(x, weight, targets, PAD, chunk, reduce),
        oracle(x, weight, targets, reduce),
    ):
        # Gradients that differ from token to token where losses do.
        each = scale * torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, weight), each)))
    for ours, stock in zip(*results, strict=True):
        assert_close(ours, stock, dtype)


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 13, 100, None])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_equals_the_loss_of_all_logits(dtype, chunk, reduce):
    assert_same(*case(dtype), chunk, dtype, reduce)


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_a_bias_of_the_logits(dtype, reduce):
    x, weight, targets = case(dtype)
    bias = torch.randn(len(weight)).to(dtype).requires_grad_()
    results = []
    for loss in (
        vocabulary_loss(x, weight, targets, PAD, 4, reduce, bias_V=bias),
        oracle(x, weight, targets, reduce, bias),
    ):
        each = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, weight, bias), each)))
    for ours, stock in zip(*results, strict=True):
        assert_close(ours, stock, dtype)


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_label_smoothing_is_that_of_fairseq(dtype, reduce):
    x, weight, targets = case(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    log_probs = F.log_softmax(F.linear(x, weight), -1, dtype=wide)
    stock = label_smoothed_nll_loss(log_probs, targets, 0.1, PAD, reduce)
    ours = smoothed_vocabulary_loss(x, weight, targets, PAD, 4, reduce, None, 0.1)
    results = []
    for smoothed, plain in (ours, stock):
        smoothed, plain = (loss.reshape(-1) for loss in (smoothed, plain))
        each = torch.linspace(0.5, 2, smoothed.numel(), dtype=smoothed.dtype)
        gradients = torch.autograd.grad(smoothed, (x, weight), each, retain_graph=True)
        results.append((smoothed.detach(), plain.detach(), *gradients))
    assert not ours[1].requires_grad
    for a, b in zip(*results, strict=True):
        assert_close(a, b, dtype)


def test_gradients_by_finite_differences():
    x, weight, targets = case(tokens=5, vocab=7, width=3)
    for reduce in (True, False):
        assert torch.autograd.gradcheck(
            lambda x, w, reduce=reduce: vocabulary_loss(x, w, targets, PAD, 2, reduce), (x, weight)
        )


def test_a_loss_scale_saves_small_gradients_in_fp16():
    x, weight, targets = case(torch.float16, vocab=4000)
    small = 2.0**-9  # unscaled most gradients of logits are below what fp16 can hold
    with torch.no_grad():
        weight.mul_(small)
    assert_same(x, weight, targets, 4, torch.float16, scale=2.0**10)


def test_certain_tokens_learn_in_bf16():
    x, weight, targets = case(torch.bfloat16)
    with torch.no_grad():
        weight.mul_(2)
        x.copy_(weight[targets])  # the target's logit is the largest by far
    probs = F.linear(x, weight).float().softmax(1).gather(1, targets[:, None])
    assert ((probs > 0.998) & (probs < 1)).any()
    assert_same(x, weight, targets, 4, torch.bfloat16)


def test_extreme_logits_stay_finite():
    x, weight, targets = case(torch.float32)
    with torch.no_grad():
        weight.mul_(1e4)
    assert_same(x, weight, targets, 4, torch.float32)


def test_under_autocast_products_are_of_its_precision_and_weights_keep_theirs():
    x, weight, targets = case(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = vocabulary_loss(x, weight, targets, PAD, 4)
    loss.backward()
    assert x.grad.dtype == weight.grad.dtype == loss.dtype == torch.float32
    half = [p.detach().bfloat16().requires_grad_() for p in (x, weight)]
    stock = oracle(*half, targets)
    stock.backward()
    assert_close(loss.detach(), stock.detach(), torch.bfloat16)
    for ours, other in zip((x, weight), half, strict=True):
        assert_close(ours.grad, other.grad.float(), torch.bfloat16)


@pytest.mark.parametrize("reduce", [True, False])
def test_nothing_but_padding_is_a_loss_of_zero(reduce):
    x, weight, targets = case()
    loss = vocabulary_loss(x, weight, torch.full_like(targets, PAD), PAD, 4, reduce)
    assert not loss.any()
    loss.sum().backward()
    assert not x.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    given = case()
    given[frozen].requires_grad_(False)
    vocabulary_loss(*given, PAD, 4).backward()
    stock = [p.detach().clone().requires_grad_(p.requires_grad) for p in given[:2]]
    oracle(*stock, given[2]).backward()
    assert given[frozen].grad is None
    assert_close(given[1 - frozen].grad, stock[1 - frozen].grad, torch.float64)


def test_backward_twice():
    x, weight, targets = case()
    loss = vocabulary_loss(x, weight, targets, PAD, 4)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (x, weight))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_no_tensor_of_all_logits():
    """The largest tensor that is made has the logits of one chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.largest = max(self.largest, tensor.numel())
            return result

    x, weight, targets = case(tokens=64, vocab=100, width=4)
    for reduce in (True, False):
        with Largest() as seen:
            vocabulary_loss(x, weight, targets, PAD, 8, reduce).sum().backward()
        assert seen.largest == 8 * 100
