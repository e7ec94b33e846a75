import logging

import pytest
import torch

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.experts.reference import one_expert
from evomoe_plugin.gates import GateContext, LayerInfo
from evomoe_plugin.gates.switch import SwitchGate
from evomoe_plugin.routing import stats as st

T, D, E = 24, 6, 5


@pytest.fixture
def make_gate(moe_options):
    def make(num_null=0, **given):
        info = LayerInfo(D, E, num_null=num_null)
        return SwitchGate(info, moe_options(moe_null_experts=num_null, **given)).double()

    return make


def tokens():
    return torch.randn(T, D, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
def test_the_formula(make_gate, training):
    gate, x = make_gate().train(training), tokens()
    plan = gate(x, GateContext())
    pairs = dict(
        zip(
            plan.token_ids_N.tolist(),
            zip(plan.expert_ids_N.tolist(), plan.weights_N.tolist(), strict=True),
            strict=True,
        )
    )
    assert plan.num_pairs == T
    for t in range(T):
        logits = [float(gate.scorer.weight[e] @ x[t]) for e in range(E)]
        probs = torch.tensor(logits, dtype=torch.float64).softmax(0)
        e = max(range(E), key=lambda e: logits[e])
        assert pairs[t] == (e, pytest.approx(float(probs[e])))  # not normalised


def test_the_balance_loss_of_the_paper(make_gate):
    """N Σ f_i P_i (arXiv 2101.03961, equations 4 to 6), over the tokens that are not padding."""
    gate, x = make_gate(), tokens()
    mask = torch.rand(T) < 0.6
    probs = (x @ gate.scorer.weight.T).softmax(1)[mask]
    loss = 0.0
    for e in range(E):
        share = sum(int(row.argmax()) == e for row in probs) / int(mask.sum())
        loss += share * float(probs[:, e].sum()) / int(mask.sum())
    plan = gate(x, GateContext(token_mask_T=mask))
    assert plan.aux["balance"].item() == pytest.approx(E * loss)


def test_gradcheck_of_weights_and_loss(make_gate):
    gate, x = make_gate(), tokens().requires_grad_()

    def outputs(x, weight):
        plan = torch.func.functional_call(gate, {"scorer.weight": weight}, (x, GateContext()))
        return plan.weights_N, plan.aux["balance"]

    assert torch.autograd.gradcheck(outputs, (x, gate.scorer.weight), fast_mode=True)


def test_the_first_tokens_fit_the_others_get_nothing(make_layer):
    layer = make_layer(moe_gate="switch", moe_capacity_factor=1.0)
    x = tokens()
    probs = (x @ layer.gate.scorer.weight.T).softmax(1)
    capacity = -(-T // E)
    taken, wanted = [0] * E, torch.zeros_like(x)
    for t in range(T):
        e = int(probs[t].argmax())
        if taken[e] < capacity:
            wanted[t] = probs[t, e] * one_expert(x[t], layer.experts, e)
        taken[e] += 1
    assert max(taken) > capacity
    y, _, stats = layer(x)
    assert torch.allclose(y, wanted, atol=1e-9)
    dropped = sum(max(count - capacity, 0) for count in taken)
    assert stats[st.DROPPED] == dropped


def test_a_token_whose_best_candidate_is_null_goes_nowhere(make_gate):
    gate, x = make_gate(num_null=2), tokens()
    logits = x @ gate.scorer.weight.T
    plan = gate(x, GateContext())
    null = logits.argmax(1) >= E
    assert 0 < null.sum() < T
    assert plan.token_ids_N.sort().values.tolist() == (~null).nonzero().squeeze(1).tolist()
    assert torch.allclose(plan.null_mass_T, logits.softmax(1).amax(1) * null)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"moe_top_k": 1}, "--moe-top-k 1: the gate switch does not use it"),
        (
            {"moe_capacity_factor": 1.0, "moe_batch_prioritized_routing": True},
            "--moe-batch-prioritized-routing True: the gate switch does not use it",
        ),
        (
            {"moe_second_expert_policy": "all"},
            "--moe-second-expert-policy all: the gate switch does",
        ),
        ({"moe_scorer": "sigmoid"}, "--moe-scorer sigmoid: with --moe-gate switch one of: linear"),
    ],
)
def test_what_it_refuses(moe_options, given, message):
    with pytest.raises(OptionError, match=message):
        validate(moe_options(moe_gate="switch", **given))


def test_nothing_to_renormalize_is_said(moe_options, caplog):
    with caplog.at_level(logging.WARNING):
        validate(moe_options(moe_gate="switch", moe_capacity_factor=1.0))
        assert not caplog.messages
        validate(
            moe_options(moe_gate="switch", moe_capacity_factor=1.0, moe_renormalize_after_drop=True)
        )
    assert any("this changes nothing" in message for message in caplog.messages)
