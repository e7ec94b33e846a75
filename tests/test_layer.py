"""Invariants 1 and 3 of the design on the whole layer, and what leaves it."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from evomoe_plugin.config.options import MoEOptions
from evomoe_plugin.experts import ExpertFFN
from evomoe_plugin.experts.reference import loop_moe
from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.dense_to_sparse import DenseToSparseGate
from evomoe_plugin.gates.gate import Gate
from evomoe_plugin.layer import MoELayer
from evomoe_plugin.routing import noise
from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.choice import Choice

T, D, F, E = 13, 6, 10, 5


def make_layer(moe_options, num_experts=E, dtype=torch.float64, **given):
    gate = DenseToSparseGate(LayerInfo(D, num_experts), moe_options(**given))
    with torch.no_grad():
        gate.scorer.weight.mul_(3)  # so that thresholds bite
    experts = ExpertFFN(num_experts, D, F, nn.functional.gelu)
    return MoELayer(gate, experts).to(dtype)


def keys(tokens=T):
    return noise.sequence_keys(torch.randint(0, 99, (1, tokens)))[0]


ROUTINGS = {
    "dense": {"moe_temperature_start": 100.0},
    "annealed": {"moe_temperature_start": 0.6, "moe_gate_threshold": 0.05},
    "sparse": {"moe_temperature_start": 0.2, "moe_temperature_end": 0.1, "moe_gate_threshold": 0.3},
    "hard": {"moe_hard_updates": 0},
    "softmax": {"moe_combine_weights": "softmax", "moe_temperature_start": 0.5},
    "noiseless": {"moe_gate_noise": "none", "moe_gate_threshold": 0.1},
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_fast_path_equals_the_loop_oracle(moe_options, routing, padding, training):
    layer = make_layer(moe_options, **ROUTINGS[routing]).train(training)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(T) < 0.7 if padding else None
    key = keys() if training else None
    y, aux, _ = layer(x, mask, key)

    plan = layer.gate(x, layer.context(mask, key))
    oracle = loop_moe(x, plan, layer.experts)
    assert torch.allclose(y, oracle, atol=1e-9)

    wanted = [x, *layer.parameters()]
    seed = torch.randn_like(y)
    got = torch.autograd.grad(y, wanted, seed, retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(oracle, wanted, seed), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


class FixedGate(Gate):
    """Routes by a fixed mask, for shapes that a learned gate rarely gives."""

    Options = MoEOptions
    capabilities = Capabilities(default_aux="none")

    def __init__(self, mask_TE):
        super().__init__(LayerInfo(D, mask_TE.size(1)), MoEOptions())
        self.mask_TE = mask_TE

    def route(self, x_TD, context):
        weights = torch.linspace(0.1, 1, self.mask_TE.numel(), dtype=x_TD.dtype)
        return Choice(self.mask_TE, weights.view(self.mask_TE.shape), self.mask_TE.double())


def one_takes_all():
    mask = torch.zeros(T, E, dtype=torch.bool)
    mask[:, 2] = True
    return mask


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(T, E).bool(),
        torch.ones(T, E).bool(),
        one_takes_all(),
        torch.eye(T, E).bool(),
        torch.ones(1, E).bool(),
        torch.zeros(0, E).bool(),
    ],
    ids=["no pair", "all pairs", "one expert takes all", "few tokens", "one token", "no token"],
)
def test_any_plan_equals_the_loop_oracle(mask):
    layer = MoELayer(FixedGate(mask), ExpertFFN(E, D, F, torch.tanh)).double()
    x = torch.randn(mask.size(0), D, dtype=torch.float64, requires_grad=True)
    y, aux, _ = layer(x)
    assert aux.shape == (0,)
    plan = layer.gate(x, GateContext())
    if mask.size(0):
        assert torch.allclose(y, loop_moe(x, plan, layer.experts), atol=1e-9)
    y.sum().backward()
    assert layer.experts.fc1_weight.grad.isfinite().all()
    assert torch.equal(y[~mask.any(1)], torch.zeros_like(y[~mask.any(1)]))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_cost_follows_the_pairs(moe_options, routing):
    layer = make_layer(moe_options, dtype=torch.float32, **ROUTINGS[routing])
    x = torch.randn(T, D, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y, _, stats = layer(x, None, keys())
        y.sum().backward()
    pairs = int(stats[st.PAIRS])
    gate_flops = 3 * 2 * T * D * E
    assert counter.get_total_flops() == 3 * 2 * (2 * pairs * D * F) + gate_flops


def test_padding_is_routed_nowhere_and_changes_nothing(moe_options):
    layer = make_layer(moe_options, **ROUTINGS["annealed"])
    x = torch.randn(T, D, dtype=torch.float64)
    mask = torch.rand(T) < 0.6
    key = keys()
    y, aux, stats = layer(x, mask, key)
    y_alone, aux_alone, stats_alone = layer(x[mask], None, key[mask])
    assert torch.allclose(y[mask], y_alone)
    assert not y[~mask].any()
    assert torch.allclose(aux, aux_alone)
    torch.testing.assert_close(stats, stats_alone)


@pytest.mark.parametrize("scale", [0.0, 1e4, 1e30])
def test_equal_and_huge_logits_stay_finite(moe_options, scale):
    layer = make_layer(moe_options, dtype=torch.float32, moe_temperature_start=0.3)
    x = torch.full((T, D), scale, requires_grad=True)
    y, aux, _ = layer(x, None, keys())
    (y.sum() * 1e-30 + aux.sum()).backward()
    assert torch.isfinite(aux).all()
    assert torch.isfinite(layer.gate.scorer.weight.grad).all()


def test_the_update_number_is_in_the_state_and_comes_back(moe_options):
    layer = make_layer(moe_options)
    layer.set_num_updates(77)
    other = make_layer(moe_options)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(T, D, dtype=torch.float64)
    torch.testing.assert_close(layer.eval()(x), other.eval()(x), rtol=0, atol=0)
    assert layer.gate.temperature(77) != layer.gate.temperature(0)


def test_noise_depends_on_seed_update_and_layer(moe_options):
    layer = make_layer(moe_options, **ROUTINGS["annealed"])
    x, key = torch.randn(T, D, dtype=torch.float64), keys()
    first = layer(x, None, key)[0]
    assert torch.equal(first, layer(x, None, key)[0])
    for part in ({"seed": 5}, {"layer_id": 3}):
        layer.gate.info = dataclasses.replace(layer.gate.info, **part)
        again = layer(x, None, key)[0]
        assert not torch.equal(first, again)
        first = again


@pytest.mark.parametrize("routing", ["annealed", "hard"])
def test_weights_of_experts_are_summed_up_on_request(moe_options, routing):
    layer = make_layer(moe_options, **ROUTINGS[routing]).eval()
    x = torch.randn(T, D, dtype=torch.float64)
    assert st.WEIGHT_E not in layer(x)[2] and st.WEIGHT_E not in layer.zero_stats()
    layer.counts_weights = True
    plan = layer.gate(x, layer.context())
    expected_E = [0.0] * E
    for expert, weight in zip(plan.expert_ids_N.tolist(), plan.weights_N.tolist(), strict=True):
        expected_E[expert] += weight
    assert layer(x)[2][st.WEIGHT_E].tolist() == pytest.approx(expected_E)
    assert layer.zero_stats()[st.WEIGHT_E].tolist() == [0.0] * E


def test_the_gate_has_gradients_of_zero_in_the_dense_phase(moe_options):
    """Also where FSDP put a view of its flat parameter in place of a parameter."""
    layer = make_layer(moe_options)
    layer.spawn_updates = 5
    scorer = layer.gate.scorer
    flat = nn.Parameter(scorer.weight.detach().flatten())
    del scorer.weight
    scorer.weight = flat.view(E, D)
    layer(torch.randn(T, D, dtype=torch.float64))[0].sum().backward()
    assert torch.equal(flat.grad, torch.zeros_like(flat))
