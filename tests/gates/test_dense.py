import logging

import pytest
import torch

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.experts.reference import one_expert
from evomoe_plugin.gates import GateContext

T, D, E = 11, 6, 5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_null", [0, 2])
def test_the_mixture_of_all_experts(make_layer, training, num_null):
    """Null experts take their share of the weight and give nothing for it."""
    layer = make_layer(moe_gate="dense", moe_null_experts=num_null).train(training)
    x = torch.randn(T, D, dtype=torch.float64)
    y, aux, _ = layer(x)
    for t in range(T):
        probs = (layer.gate.scorer.weight @ x[t]).softmax(0)
        wanted = sum(probs[e] * one_expert(x[t], layer.experts, e) for e in range(E))
        assert torch.allclose(y[t], wanted, atol=1e-9)
    assert aux.shape == (0,)
    assert layer.gate(x, GateContext()).num_pairs == T * E


def test_gradcheck(make_layer):
    layer = make_layer(moe_gate="dense")
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)

    def outputs(x, weight):
        return torch.func.functional_call(layer, {"gate.scorer.weight": weight}, (x,))[0]

    assert torch.autograd.gradcheck(outputs, (x, layer.gate.scorer.weight), fast_mode=True)


def test_padding_goes_nowhere(make_layer):
    layer = make_layer(moe_gate="dense")
    mask = torch.rand(T) < 0.5
    plan = layer.gate(torch.randn(T, D).double(), GateContext(token_mask_T=mask))
    assert plan.tokens_per_expert_E.tolist() == [int(mask.sum())] * E


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"moe_capacity_factor": 1.0},
            "--moe-capacity-factor 1.0: the gate dense sets the load of experts itself",
        ),
        ({"moe_eval_capacity_factor": 1.0}, "--moe-eval-capacity-factor 1.0: the gate dense sets"),
        ({"moe_top_k": 4}, "--moe-top-k 4: the gate dense does not use it"),
        ({"moe_scorer": "sigmoid"}, "--moe-scorer sigmoid: with --moe-gate dense one of"),
    ],
)
def test_what_it_refuses(moe_options, given, message):
    with pytest.raises(OptionError, match=message):
        validate(moe_options(moe_gate="dense", **given))


@pytest.mark.parametrize("loss", ["balance", "switch", "load"])
def test_losses_that_it_warns_of_are_constant(make_layer, caplog, loss):
    with caplog.at_level(logging.WARNING):
        layer = make_layer(moe_gate="dense", moe_aux=loss)
    assert any(f"--moe-aux {loss}: " in message for message in caplog.messages)
    _, aux, _ = layer(torch.randn(T, D).double())
    (grad,) = torch.autograd.grad(aux.sum(), [layer.gate.scorer.weight])
    assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("loss", ["mi", "importance", "entropy", "z"])
def test_other_losses_are_not_constant(make_layer, caplog, loss):
    with caplog.at_level(logging.WARNING):
        layer = make_layer(moe_gate="dense", moe_aux=loss)
    assert not caplog.messages
    _, aux, _ = layer(torch.randn(T, D).double())
    (grad,) = torch.autograd.grad(aux.sum(), [layer.gate.scorer.weight])
    assert grad.abs().max() > 1e-6
