import logging
import math

import pytest
import torch

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.gates import GateContext, LayerInfo
from evomoe_plugin.gates.gshard import GShardGate
from evomoe_plugin.routing.noise import gumbel, sequence_keys

T, D, E = 30, 6, 5
POLICIES = ("all", "random", "sampling")
NORMALIZE_FIRST = {"moe_normalize_gate_prob_before_dropping": True}


@pytest.fixture
def make_gate(moe_options):
    def make(num_null=0, **given):
        info = LayerInfo(D, E, num_null=num_null)
        return GShardGate(info, moe_options(moe_null_experts=num_null, **given)).double()

    return make


def keys(count=T):
    return sequence_keys(torch.arange(count).unsqueeze(0))[0]


def tokens(count=T):
    return torch.randn(count, D, dtype=torch.float64)


def by_hand(logits, noise, chance, policy, normalize_first, prioritized, factor):
    """The weights [T, E] that fairseq's top-2 gate gives, token by token."""
    probs, picks = logits.softmax(1).tolist(), []
    for t, p in enumerate(probs):
        first = p.index(max(p))
        ranked = logits[t] + noise[t] if policy == "sampling" else logits[t]
        second = max((e for e in range(E) if e != first), key=lambda e: float(ranked[e]))
        share = p[second] / (p[first] + p[second]) if normalize_first else p[second]
        total = p[first] + p[second] if normalize_first else None
        if policy == "random" and chance[t] >= 2 * share:
            second = None
        picks.append((first, second, total))
    order = list(range(T))
    if prioritized:
        order.sort(key=lambda t: -max(probs[t]))
    pairs = sum(1 + (second is not None) for _, second, _ in picks)
    capacity = math.ceil(factor * pairs / E)
    taken, kept = [0] * E, [[] for _ in range(T)]
    for turn in (0, 1):
        for t in order:
            e = picks[t][turn]
            if e is None:
                continue
            if taken[e] < capacity:
                kept[t].append(e)
            taken[e] += 1
    assert factor >= E or max(taken) > capacity
    weights = torch.zeros(T, E, dtype=torch.float64)
    for t, (_, _, total) in enumerate(picks):
        for e in kept[t]:
            weights[t, e] = probs[t][e] / (total or sum(probs[t][e] for e in kept[t]))
    return weights


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("normalize_first", [False, True])
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("factor", [0.6, 1.0, float(E)])
def test_it_equals_the_loop(make_layer, monkeypatch, policy, normalize_first, prioritized, factor):
    layer = make_layer(
        moe_gate="gshard",
        moe_second_expert_policy=policy,
        moe_capacity_factor=factor,
        moe_batch_prioritized_routing=prioritized,
        moe_normalize_gate_prob_before_dropping=normalize_first,
    )
    chance = torch.rand(T)
    monkeypatch.setattr(
        "evomoe_plugin.gates.gshard.uniform", lambda keys_T, columns: chance.unsqueeze(1)
    )
    x = tokens()
    plan = layer._within_capacity(layer.gate(x, GateContext(token_keys_T=keys())))
    got = torch.zeros(T, E, dtype=torch.float64)
    got[plan.token_ids_N, plan.expert_ids_N] = plan.weights_N.detach()
    wanted = by_hand(
        (x @ layer.gate.scorer.weight.T).detach(),
        gumbel(keys(), E).double(),
        chance,
        policy,
        normalize_first,
        prioritized,
        factor,
    )
    assert torch.allclose(got, wanted, atol=1e-9)


@pytest.mark.parametrize("policy", POLICIES)
def test_evaluation_takes_the_two_best(make_gate, policy):
    gate, x = make_gate(moe_second_expert_policy=policy).eval(), tokens()
    choice = gate.route(x, GateContext(token_keys_T=keys()))
    picks = (x @ gate.scorer.weight.T).topk(2, dim=1).indices.sort(1).values
    assert torch.equal(choice.mask_TC.nonzero()[:, 1].view(T, 2), picks)
    sums = (choice.weights_TC * choice.mask_TC).sum(1)
    assert torch.allclose(sums, torch.ones_like(sums))


def test_sampled_seconds_follow_the_probabilities(make_gate):
    count = 6000
    gate, x = make_gate(), tokens(1).expand(count, D)
    choice = gate.route(x, GateContext(token_keys_T=keys(count)))
    probs = choice.probs_TC[0].detach()
    first = int(probs.argmax())
    assert choice.mask_TC[:, first].all()
    rest = [e for e in range(E) if e != first]
    seen = choice.mask_TC[:, rest].sum(0)
    assert seen.sum() == count
    expected = count * probs[rest] / probs[rest].sum()
    chi_square = ((seen - expected) ** 2 / expected).sum()
    freedom = len(rest) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("normalize_first", [False, True])
def test_random_seconds_are_taken_with_twice_their_weight(make_gate, normalize_first):
    count = 6000
    gate = make_gate(
        moe_second_expert_policy="random",
        moe_capacity_factor=1.0,
        moe_normalize_gate_prob_before_dropping=normalize_first,
    )
    gate.scorer.weight.data.mul_(2)
    x = tokens(1).expand(count, D)
    choice = gate.route(x, GateContext(token_keys_T=keys(count)))
    p1, p2 = choice.probs_TC[0].detach().topk(2).values.tolist()
    chance = 2 * (p2 / (p1 + p2) if normalize_first else p2)
    assert 0.1 < chance < 0.9
    lonely = choice.mask_TC.sum(1) == 1
    deviation = (chance * (1 - chance) / count) ** 0.5
    assert abs(float((~lonely).double().mean()) - chance) < 4 * deviation
    weight = (choice.weights_TC * choice.mask_TC).sum(1)[lonely]
    alone = p1 / (p1 + p2) if normalize_first else 1.0
    assert torch.allclose(weight, torch.full_like(weight, alone))


def test_the_balance_loss_counts_first_picks(make_gate):
    gate, x = make_gate(), tokens()
    mask = torch.rand(T) < 0.6
    plan = gate(x, GateContext(token_keys_T=keys(), token_mask_T=mask))
    probs = (x @ gate.scorer.weight.T).softmax(1)[mask]
    firsts = torch.nn.functional.one_hot(probs.argmax(1), E).double()
    wanted = E * probs.mean(0) @ firsts.mean(0)
    assert plan.aux["balance"].item() == pytest.approx(wanted.item())


@pytest.mark.parametrize("factor", [0.6, float(E)])
@pytest.mark.parametrize("normalize_first", [False, True])
def test_gradcheck(make_layer, factor, normalize_first):
    layer = make_layer(
        moe_gate="gshard",
        moe_capacity_factor=factor,
        moe_normalize_gate_prob_before_dropping=normalize_first,
    )
    x = tokens().requires_grad_()

    def outputs(x, weight):
        values = {"gate.scorer.weight": weight}
        return torch.func.functional_call(layer, values, (x, None, keys()))[:2]

    assert torch.autograd.gradcheck(outputs, (x, layer.gate.scorer.weight), fast_mode=True)


def test_what_dropping_leaves(make_layer):
    """The survivor of a pair gets weight 1, as in fairseq; its share if normalised before."""
    x = tokens()
    for given, one in (({}, True), (NORMALIZE_FIRST, False)):
        layer = make_layer(moe_gate="gshard", moe_capacity_factor=0.6, **given)
        plan = layer._within_capacity(layer.gate(x, GateContext()))
        alone = plan.token_ids_N.bincount(minlength=T) == 1
        weights = plan.weights_N[alone[plan.token_ids_N]]
        assert weights.numel() > 3
        assert torch.allclose(weights, torch.ones_like(weights)) == one
        assert (weights < 1 - 1e-6).all() != one


def test_null_experts_can_be_first_or_second(make_gate):
    gate, x = make_gate(num_null=2, moe_second_expert_policy="all"), tokens()
    plan = gate(x, GateContext())
    probs = (x @ gate.scorer.weight.T).softmax(1)
    top = probs.topk(2)
    null = top.indices >= E
    assert torch.equal(plan.token_ids_N.bincount(minlength=T), (~null).sum(1))
    shares = top.values / top.values.sum(1, keepdim=True)
    assert torch.allclose(plan.null_mass_T, (shares * null).sum(1))
    assert set(null.sum(1).tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"moe_second_expert_policy": "best"},
            "--moe-second-expert-policy best: one of: sampling, random, all",
        ),
        ({"moe_expert_count": "1,4"}, "--moe-expert-count 1,4: the gate gshard selects two"),
        (NORMALIZE_FIRST, "--moe-normalize-gate-prob-before-dropping True: nothing is dropped"),
        (
            {**NORMALIZE_FIRST, "moe_capacity_factor": 1.0, "moe_renormalize_after_drop": True},
            "--moe-normalize-gate-prob-before-dropping True: --moe-renormalize-after-drop",
        ),
        (
            {"moe_batch_prioritized_routing": True},
            "--moe-batch-prioritized-routing True: experts have no capacity in training",
        ),
        (
            {
                "moe_batch_prioritized_routing": True,
                "moe_capacity_factor": 1.0,
                "moe_drop_policy": "probs",
            },
            "--moe-drop-policy probs: ",
        ),
        ({"moe_top_k": 3}, "--moe-top-k 3: the gate gshard does not use it"),
        ({"moe_scorer": "sigmoid"}, "--moe-scorer sigmoid: with --moe-gate gshard one of"),
    ],
)
def test_what_it_refuses(moe_options, given, message):
    with pytest.raises(OptionError, match=message):
        validate(moe_options(moe_gate="gshard", **given))


@pytest.mark.parametrize(
    "given",
    [
        {"moe_second_expert_policy": "random"},
        {"moe_capacity_factor": 1.0},
        {"moe_eval_capacity_token_fraction": 0.25},
    ],
)
def test_normalizing_before_dropping_needs_something_that_drops(moe_options, given):
    validate(moe_options(moe_gate="gshard", **NORMALIZE_FIRST, **given))


def test_priority_is_not_causal(moe_options, caplog):
    with caplog.at_level(logging.WARNING):
        validate(moe_options(moe_gate="gshard", moe_capacity_factor=1.0))
        assert not caplog.messages
        validate(
            moe_options(
                moe_gate="gshard", moe_capacity_factor=1.0, moe_batch_prioritized_routing=True
            )
        )
    assert ["not causal" in text for text in caplog.messages] == [True]
