import pytest
import torch

from evomoe_plugin.gates.dselect_k import smooth_step


@pytest.mark.parametrize("width", [0.3, 1.0, 4.0])
def test_the_formula_by_hand(width):
    for x in (-3.0, -0.5, -0.4, 0.0, 0.1, 0.49, 0.5, 7.0):
        x *= width
        if abs(x) >= width / 2:
            wanted = float(x > 0)
        else:
            wanted = -2 * x**3 / width**3 + 3 * x / (2 * width) + 0.5
        assert smooth_step(torch.tensor(x).double(), width).item() == pytest.approx(wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_reaches_0_and_1_exactly_and_never_leaves_them(dtype):
    x = torch.tensor([-float("inf"), -1e30, -1.0, -0.5, 0.5, 1.0, 1e30, float("inf")], dtype=dtype)
    assert smooth_step(x, 1.0).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    inside = smooth_step(torch.linspace(-0.6, 0.6, 4001).to(dtype), 1.0)
    assert inside.min() == 0
    assert inside.max() == 1


def test_gradcheck():
    x = torch.linspace(-2, 2, 81, dtype=torch.float64, requires_grad=True)  # the ends among them
    assert torch.autograd.gradcheck(lambda x: smooth_step(x, 1.6), x, atol=1e-4)
    assert torch.autograd.gradgradcheck(lambda x: smooth_step(x, 1.63), x)
    smooth_step(x, 1.6).sum().backward()
    assert (x.grad[x.abs() > 0.8] == 0).all()
    assert (x.grad[x.abs() < 0.79] > 0).all()


def test_it_is_a_step_and_its_mirror():
    x = torch.randn(1000, dtype=torch.float64)
    assert torch.allclose(smooth_step(x, 1.0) + smooth_step(-x, 1.0), torch.ones_like(x))
