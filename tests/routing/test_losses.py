import pytest
import torch

from evomoe_plugin.routing.losses import balance_loss, masked_mean


def test_balance_against_the_formula_by_hand():
    gates = torch.tensor([[0.7, 0.3], [0.2, 0.8], [0.6, 0.4]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [False, True], [True, False]])
    gates = (gates * mask).requires_grad_()
    loss = balance_loss(gates, mask)
    # E=2; mean gates (1.3/3, 1.1/3); shares of tokens (2/3, 2/3)
    assert loss.item() == pytest.approx(2 * (1.3 / 3 * 2 / 3 + 1.1 / 3 * 2 / 3))
    loss.backward()
    assert torch.allclose(gates.grad, torch.full_like(gates, 2 * 2 / 3 / 3))


def test_balance_is_the_number_of_experts_when_all_are_used_evenly():
    gates = torch.full((10, 4), 0.25)
    assert balance_loss(gates, torch.ones(10, 4, dtype=torch.bool)).item() == pytest.approx(4)


def test_padding_is_excluded():
    gates = torch.rand(6, 3)
    mask = torch.rand(6, 3) < 0.6
    real = torch.tensor([True, True, False, True, False, True])
    masked = balance_loss(gates * mask * real[:, None], mask & real[:, None], real)
    assert masked.item() == pytest.approx(balance_loss((gates * mask)[real], mask[real]).item())


@pytest.mark.parametrize("tokens", [0, 3])
def test_no_real_token_gives_zero_not_nan(tokens):
    mask = torch.zeros(tokens, dtype=torch.bool)
    assert masked_mean(torch.rand(tokens, 2), mask).tolist() == [0, 0]
