import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from evomoe_plugin.experts import ExpertFFN
from evomoe_plugin.experts.activations import ROWS, find_activation
from evomoe_plugin.experts.kernels.cpu import grouped, segment_matmul
from evomoe_plugin.experts.kernels.cpu.grouped import grouped_ffn
from tests.experts import one_by_one
from tests.experts.one_by_one import oracle

COUNTS = [[3, 0, 4], [7, 0, 0], [0, 0, 0], [1, 1, 1]]
ACTIVATIONS = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}
D, F, E, T = 4, 6, 3, 5


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks that cut through experts and hold several."""
    monkeypatch.setattr(grouped, "CHUNK_ROWS", 2)
    monkeypatch.setattr(grouped, "CHUNKS", 100)


def tensors(gated, bias, dtype=torch.float64):
    return one_by_one.tensors(E, D, F, gated, bias, dtype)


def inputs(counts, combines, dtype=torch.float64):
    pairs = sum(counts)
    x = torch.randn(T if combines else pairs, D, dtype=dtype).requires_grad_()
    if not combines:
        return x, None, None
    token_ids = torch.cat([torch.arange(T).repeat(2)[:count] for count in counts]).long()
    row_weights = torch.rand(pairs, dtype=dtype) - 0.3
    row_weights[0:1], row_weights[2:3] = 0.0, 1e-200  # too small to divide by
    return x, token_ids, row_weights.requires_grad_()


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("function", ACTIVATIONS)
@pytest.mark.parametrize("combines", [True, False])
def test_equals_one_expert_after_the_other(counts, function, combines, short_chunks):
    for gated, bias in itertools.product((True, False), repeat=2):
        weights = tensors(gated, bias)
        x, token_ids, row_weights = inputs(counts, combines)
        got = grouped_ffn(
            x,
            weights,
            counts,
            find_activation(ACTIVATIONS[function]),
            token_ids_N=token_ids,
            weights_N=row_weights,
        )
        wanted = oracle(x, weights, counts, ACTIVATIONS[function], token_ids, row_weights)
        assert torch.allclose(got, wanted, atol=1e-12)
        leaves = [x, *weights.values()] + ([row_weights] if combines else [])
        seed = torch.randn_like(got)
        # Twice: a graph that is kept gives the same again.
        for keep in (True, False):
            gradients = torch.autograd.grad(got, leaves, seed, retain_graph=keep)
        for a, b in zip(gradients, torch.autograd.grad(wanted, leaves, seed), strict=True):
            assert torch.allclose(a, b, atol=1e-11)


@pytest.mark.parametrize("gated", [True, False])
def test_gradcheck(gated):
    counts = [3, 0, 4]
    weights = tensors(gated, bias=not gated)
    x, token_ids, row_weights = inputs(counts, True)

    def run(x, row_weights, *segment_matmul):
        return grouped_ffn(
            x,
            dict(zip(weights, segment_matmul, strict=True)),
            counts,
            find_activation(nn.functional.gelu),
            token_ids_N=token_ids,
            weights_N=row_weights,
        )

    assert torch.autograd.gradcheck(run, (x, row_weights, *weights.values()))


@pytest.mark.parametrize(
    "dtype, most", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("gated", [True, False])
def test_lower_precision_is_near_fp64(dtype, most, gated):
    counts, function = [40, 0, 30], nn.functional.gelu
    low = {
        name: w.detach().to(dtype).requires_grad_() for name, w in tensors(gated, not gated).items()
    }
    exact = {name: w.detach().double().requires_grad_() for name, w in low.items()}
    token_ids = torch.cat([torch.arange(40), torch.arange(30)])
    x = torch.randn(40, D).to(dtype).requires_grad_()
    row_weights = torch.rand(70).requires_grad_()
    got = grouped_ffn(
        x, low, counts, find_activation(function), token_ids_N=token_ids, weights_N=row_weights
    )
    x64, row64 = (t.detach().double().requires_grad_() for t in (x, row_weights))
    wanted = oracle(x64, exact, counts, function, token_ids, row64)
    assert got.dtype == dtype
    seed = torch.randn_like(got)
    gradients = torch.autograd.grad(got, [x, row_weights, *low.values()], seed)
    expected = torch.autograd.grad(wanted, [x64, row64, *exact.values()], seed.double())
    for a, b in zip([got, *gradients], [wanted, *expected], strict=True):
        assert (a.double() - b).norm() < most * b.norm()


def test_autocast_rounds_to_its_precision_and_leaves_gradients_in_fp32():
    counts = [4, 3, 0]
    weights = tensors(False, True, torch.float32)
    x, token_ids, row_weights = inputs(counts, True, torch.float32)
    function = find_activation(nn.functional.gelu)
    with torch.autocast("cpu", torch.bfloat16):
        got = grouped_ffn(
            x, weights, counts, function, token_ids_N=token_ids, weights_N=row_weights
        )
    wanted = grouped_ffn(x, weights, counts, function, token_ids_N=token_ids, weights_N=row_weights)
    assert got.dtype == torch.float32
    assert 0 < (got - wanted).abs().max() < 0.1
    got.sum().backward()
    assert all(w.grad.dtype == torch.float32 for w in (x, row_weights, *weights.values()))


def test_dropped_values_are_dropped_in_both_passes():
    counts, p = [50, 30, 20], 0.4
    weights = tensors(False, False)
    x = torch.randn(100, D, dtype=torch.float64).requires_grad_()
    torch.manual_seed(3)
    identity = find_activation(lambda h: h * 1)
    got = grouped_ffn(x, weights, counts, identity, dropout=p)
    # Linear in x: forward and backward pass must use the same mask.
    seed = torch.randn_like(got)
    (grad,) = torch.autograd.grad(got, x, seed)
    assert torch.allclose((grad * x).sum(1), (got * seed).sum(1), atol=1e-9)
    plain = grouped_ffn(x, weights, counts, identity)
    assert not torch.allclose(got, plain)
    torch.manual_seed(3)
    mean = torch.stack(
        [grouped_ffn(x, weights, counts, identity, dropout=p) for _ in range(400)]
    ).mean(0)
    assert (mean - plain).abs().mean() < 0.15 * plain.abs().mean()


def test_only_dropout_that_works_drops():
    experts = ExpertFFN(E, D, F, nn.functional.relu, nn.Dropout(0.5))
    given = torch.randn(6, D), [2, 2, 2]
    assert not torch.equal(experts.forward_rows(*given), experts.forward_rows(*given))
    experts.eval()
    assert torch.equal(experts.forward_rows(*given), experts.forward_rows(*given))


def test_an_expert_without_rows_gets_zero_gradient_not_none():
    experts = ExpertFFN(3, 4, 6, nn.functional.relu)
    experts.forward_rows(torch.randn(5, 4), [5, 0, 0]).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad[0].any()
        assert not parameter.grad[1:].any()


def test_gradients_are_scaled():
    weights = tensors(False, True)
    rows = torch.randn(7, D, dtype=torch.float64)
    grads = [
        torch.autograd.grad(
            grouped_ffn(
                rows, weights, [3, 0, 4], find_activation(torch.tanh), grad_scale=scale
            ).sum(),
            list(weights.values()),
        )
        for scale in (1.0, 0.25)
    ]
    for whole, quarter in zip(*grads, strict=True):
        assert torch.allclose(whole / 4, quarter)


def test_what_is_frozen_costs_no_gradient():
    weights = tensors(False, True)
    weights["fc1_weight"].requires_grad_(False)
    rows = torch.randn(7, D, dtype=torch.float64)
    out = grouped_ffn(rows, weights, [3, 0, 4], find_activation(torch.tanh))
    out.sum().backward()
    assert weights["fc1_weight"].grad is None
    assert weights["fc2_weight"].grad.any()


def test_gradients_become_the_parameters_own_without_a_copy(monkeypatch):
    made = []
    before = segment_matmul.Gradient.whole

    def whole(gradient):
        grad = before(gradient)
        made.append(grad.data_ptr())
        return grad

    monkeypatch.setattr(segment_matmul.Gradient, "whole", whole)
    experts = ExpertFFN(4, 256, 1024, nn.functional.gelu)
    experts.forward_rows(torch.randn(4, 256), [1, 1, 1, 1]).sum().backward()
    assert {p.grad.data_ptr() for p in experts.parameters()} == set(made)
    assert all(p.grad.is_contiguous() for p in experts.parameters())


@pytest.mark.distributed
def test_few_kernels_are_compiled_for_many_numbers_of_rows():
    script = (
        "import torch\nfrom evomoe_plugin.experts import ExpertFFN\n"
        "experts = ExpertFFN(1, 8, 16, torch.nn.functional.gelu)\n"
        "for n in range(1, 400): experts.forward_rows(torch.randn(n, 8), [n]).sum().backward()"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "ONEDNN_VERBOSE": "1"},
        check=True,
    )
    shapes = {line.split(",")[-2] for line in run.stdout.splitlines() if "eltwise" in line}
    assert 0 < len(shapes) <= 1024 // ROWS


def test_initial_bounds_are_those_of_nn_linear():
    experts = ExpertFFN(4, 64, 256, nn.functional.gelu)
    for parameter, fan_in in [
        (experts.fc1_weight, 64),
        (experts.fc2_weight, 256),
        (experts.fc1_bias, 64),
        (experts.fc2_bias, 256),
    ]:
        assert 0.9 * fan_in**-0.5 < parameter.abs().max() <= fan_in**-0.5
