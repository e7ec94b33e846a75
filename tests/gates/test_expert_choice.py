import logging
import math

import pytest
import torch

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.gates import GateContext, LayerInfo
from evomoe_plugin.gates.expert_choice import ExpertChoiceGate

T, D, E = 23, 6, 5


@pytest.fixture
def make_gate(moe_options):
    def make(**given):
        options = moe_options(moe_gate="expert_choice", moe_allow_noncausal=True, **given)
        return ExpertChoiceGate(LayerInfo(D, E), options).double()

    return make


def tokens():
    return torch.randn(T, D, dtype=torch.float64)


def weights_of(plan):
    weights_TE = torch.zeros(T, E, dtype=torch.float64)
    weights_TE[plan.token_ids_N, plan.expert_ids_N] = plan.weights_N.detach()
    return weights_TE


@pytest.mark.parametrize("factor", [0.1, 1.0, 1.7, 2.0, 5.0])
@pytest.mark.parametrize("padding", [False, True])
def test_each_expert_takes_its_best_tokens(make_gate, factor, padding):
    gate, x = make_gate(moe_expert_choice_factor=factor), tokens()
    mask = torch.rand(T) < 0.7 if padding else torch.ones(T, dtype=torch.bool)
    plan = gate(x, GateContext(token_mask_T=mask if padding else None))
    probs = (x @ gate.scorer.weight.T).softmax(1)
    real = [t for t in range(T) if mask[t]]
    capacity = min(math.ceil(factor * len(real) / E), len(real))
    wanted = torch.zeros(T, E, dtype=torch.float64)
    for e in range(E):
        for t in sorted(real, key=lambda t, e=e: -float(probs[t, e]))[:capacity]:
            wanted[t, e] = probs[t, e]
    assert torch.allclose(weights_of(plan), wanted)
    assert plan.tokens_per_expert_E.tolist() == [capacity] * E


def test_of_equal_tokens_the_first_are_taken(make_gate):
    gate = make_gate(moe_expert_choice_factor=1.0)
    plan = gate(torch.ones(T, D, dtype=torch.float64), GateContext())
    capacity = math.ceil(T / E)
    assert plan.token_ids_N.tolist() == list(range(capacity)) * E


def test_padding_is_not_taken_even_where_it_scores_best(make_gate):
    gate, x = make_gate(), tokens()
    mask = torch.rand(T) < 0.3
    x[~mask] = 100 * gate.scorer.weight.detach().sum(0)
    plan = gate(x, GateContext(token_mask_T=mask))
    assert mask[plan.token_ids_N].all()
    assert plan.num_pairs == E * math.ceil(2.0 * int(mask.sum()) / E)


@pytest.mark.parametrize("factor, picks", [(0.2, 1), (1.4, 1), (1.5, 2), (2.5, 3), (5.0, 5)])
def test_evaluation_is_each_tokens_own_choice(make_gate, factor, picks):
    gate, x = make_gate(moe_expert_choice_factor=factor).eval(), tokens()
    probs = (x @ gate.scorer.weight.T).softmax(1)
    weights = weights_of(gate(x, GateContext()))
    for t in range(T):
        best = sorted(range(E), key=lambda e, t=t: -float(probs[t, e]))[:picks]
        assert sorted(weights[t].nonzero().squeeze(1).tolist()) == sorted(best)
        assert torch.allclose(weights[t, best], probs[t, best])


def test_later_tokens_change_earlier_ones_in_training_only(make_gate):
    gate, x = make_gate(), tokens()
    later = x.clone()
    later[T // 2 :] *= 10
    half = slice(0, T // 2)

    def differs():
        return not torch.equal(*(weights_of(gate(z, GateContext()))[half] for z in (x, later)))

    assert differs()
    gate.eval()
    assert not differs()


def test_gradcheck(make_gate):
    gate, x = make_gate(), tokens().requires_grad_()

    def outputs(x, weight):
        return torch.func.functional_call(
            gate, {"scorer.weight": weight}, (x, GateContext())
        ).weights_N

    assert torch.autograd.gradcheck(outputs, (x, gate.scorer.weight), fast_mode=True)


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"moe_allow_noncausal": False},
            "--moe-gate expert_choice: .*later tokens, which a causal model must not.*"
            "--moe-allow-noncausal",
        ),
        ({"moe_expert_choice_factor": 0.0}, "--moe-expert-choice-factor 0.0: "),
        ({"moe_expert_choice_factor": -1.0}, "--moe-expert-choice-factor -1.0: "),
        ({"moe_expert_choice_factor": float("nan")}, "--moe-expert-choice-factor nan: "),
        (
            {"moe_expert_choice_factor": 4.5, "moe_expert_count": "4,16"},
            "--moe-expert-choice-factor 4.5: an MoE layer has 4 experts",
        ),
        ({"moe_null_experts": 1}, "--moe-null-experts 1: the gate expert_choice cannot"),
        ({"moe_capacity_factor": 1.0}, "--moe-capacity-factor 1.0: the gate expert_choice sets"),
        ({"moe_top_k": 3}, "--moe-top-k 3: the gate expert_choice does not use it"),
    ],
)
def test_what_it_refuses(moe_options, given, message):
    given = {"moe_allow_noncausal": True, **given}
    with pytest.raises(OptionError, match=message):
        validate(moe_options(moe_gate="expert_choice", **given))


def test_its_options_belong_to_no_other_gate(moe_options):
    with pytest.raises(OptionError, match="--moe-allow-noncausal True: the gate top_k does not"):
        validate(moe_options(moe_gate="top_k", moe_allow_noncausal=True))


def test_it_warns(moe_options, caplog):
    with caplog.at_level(logging.WARNING):
        validate(
            moe_options(moe_gate="expert_choice", moe_allow_noncausal=True, moe_aux="balance=1,z=1")
        )
    assert len(caplog.messages) == 2
    assert "is not causal" in caplog.messages[0]
    assert "--moe-aux balance" in caplog.messages[1]
