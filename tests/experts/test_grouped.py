import pytest
import torch
from torch import nn

from evomoe_plugin.experts import ExpertFFN
from evomoe_plugin.experts.grouped import grouped_linear

COUNTS = [[3, 0, 4], [7, 0, 0], [0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_gradcheck(counts, bias, transposed):
    rows = torch.randn(sum(counts), 2, dtype=torch.float64, requires_grad=True)
    shape = (3, 5, 2) if transposed else (3, 2, 5)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 5, dtype=torch.float64, requires_grad=True) if bias else None

    def product(rows, weight, b):
        return grouped_linear(rows, weight.transpose(1, 2) if transposed else weight, b, counts)

    assert product(rows, weight, b).shape == (sum(counts), 5)
    if rows.numel():
        assert torch.autograd.gradcheck(product, (rows, weight, b))


@pytest.mark.parametrize("counts", COUNTS)
def test_experts_equal_dense_networks_of_their_own(counts):
    experts = ExpertFFN(3, 4, 6, nn.functional.gelu).double()
    rows = torch.randn(sum(counts), 4, dtype=torch.float64, requires_grad=True)
    out = experts(rows, counts)
    wanted = []
    for e, segment in enumerate(rows.split(counts)):
        hidden = nn.functional.gelu(segment @ experts.fc1_weight[e].T + experts.fc1_bias[e])
        wanted.append(hidden @ experts.fc2_weight[e] + experts.fc2_bias[e])
    assert torch.allclose(out, torch.cat(wanted), atol=1e-12)

    grad = torch.randn_like(out)
    parameters = [rows, *experts.parameters()]
    got = torch.autograd.grad(out, parameters, grad)
    for a, b in zip(got, torch.autograd.grad(torch.cat(wanted), parameters, grad), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_an_expert_without_rows_gets_zero_gradient_not_none():
    experts = ExpertFFN(3, 4, 6, nn.functional.relu)
    experts(torch.randn(5, 4), [5, 0, 0]).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad[0].any()
        assert not parameter.grad[1:].any()


def test_weight_gradient_keeps_the_parameters_layout():
    experts = ExpertFFN(2, 4, 6, nn.functional.relu)
    experts(torch.randn(5, 4), [2, 3]).sum().backward()
    assert experts.fc1_weight.grad.is_contiguous()
    assert experts.fc2_weight.grad.is_contiguous()


def test_initial_bounds_are_those_of_nn_linear():
    experts = ExpertFFN(4, 64, 256, nn.functional.gelu)
    for parameter, fan_in in [(experts.fc1_weight, 64), (experts.fc2_weight, 256),
                              (experts.fc1_bias, 64), (experts.fc2_bias, 256)]:
        assert 0.9 * fan_in**-0.5 < parameter.abs().max() <= fan_in**-0.5
