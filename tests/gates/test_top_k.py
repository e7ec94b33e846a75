import logging

import pytest
import torch
import torch.nn.functional as F

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.gates import GateContext, LayerInfo
from evomoe_plugin.gates.scorers import SCORERS
from evomoe_plugin.gates.top_k import TopKGate
from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.noise import sequence_keys

T, D, E = 40, 8, 6


@pytest.fixture
def make_gate(moe_options):
    def make(num_null=0, **given):
        info = LayerInfo(D, E, num_null=num_null)
        return TopKGate(info, moe_options(moe_null_experts=num_null, **given)).double()

    return make


def tokens(count=T):
    return torch.randn(count, D, dtype=torch.float64)


def keyed(count=T, **given):
    return GateContext(token_keys_T=sequence_keys(torch.arange(count).unsqueeze(0))[0], **given)


def chosen(gate, x, context=None):
    """The picks, [T, K]; in no order."""
    mask_TC = gate.route(x, context or GateContext()).mask_TC
    return mask_TC.nonzero()[:, 1].view(x.size(0), -1)


# The formula


def score_by_hand(name, scorer, x):
    """Scores of one token, from the papers' formulas."""

    def cosines(x, centres):
        return torch.stack([x @ c / (x.norm() * c.norm()) for c in centres])

    if name == "linear":
        return (scorer.weight @ x).softmax(0)
    if name == "sigmoid":
        return 1 / (1 + torch.exp(-(scorer.weight @ x)))
    if name == "mlp":
        hidden = F.gelu(scorer.hidden_weight @ x + scorer.hidden_bias)
        return (scorer.weight @ hidden).softmax(0)
    if name == "gmm":
        x = scorer.projection @ x
    return (scorer.log_scale.exp() * cosines(x, scorer.centres)).softmax(0)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("weights", ["raw", "renormalized"])
@pytest.mark.parametrize("top_k", [1, 3, E])
def test_the_formula(make_gate, scorer, weights, top_k):
    gate = make_gate(moe_scorer=scorer, moe_top_k_weights=weights, moe_top_k=top_k)
    if hasattr(gate.scorer, "log_scale"):
        gate.scorer.log_scale.data.fill_(1.5)
    x = tokens()
    plan = gate(x, GateContext())
    got = torch.zeros(T, E, dtype=torch.float64)
    got[plan.token_ids_N, plan.expert_ids_N] = plan.weights_N.detach()
    loss_probs, loss_load = torch.zeros(E).double(), torch.zeros(E).double()
    for t in range(T):
        scores = score_by_hand(scorer, gate.scorer, x[t]).detach()
        picks = sorted(range(E), key=lambda e: -float(scores[e]))[:top_k]
        wanted = torch.zeros(E, dtype=torch.float64)
        total = scores[picks].sum() if weights == "renormalized" else 1.0
        wanted[picks] = scores[picks] / total
        assert torch.allclose(got[t], wanted, atol=1e-9)
        loss_probs += scores / scores.sum() / T
        loss_load[picks] += 1 / T
    assert plan.aux["balance"].item() == pytest.approx(float(E * loss_probs @ loss_load))


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_bound_of_the_scale_and_log_scores(make_gate, scorer):
    """Logs of the scores, which draws need, agree with the scores but for a constant a row."""
    gate, x = make_gate(moe_scorer=scorer), tokens()
    logits = gate.score(x)
    difference = gate.scorer.log_scores(logits) - gate.scorer.scores(logits).log()
    assert torch.allclose(difference, difference[:, :1].expand_as(difference), atol=1e-9)
    if hasattr(gate.scorer, "log_scale"):
        gate.scorer.log_scale.data.fill_(50.0)
        assert gate.score(x).abs().max() <= 100 + 1e-6


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("weights", ["raw", "renormalized"])
def test_gradcheck_of_weights_and_loss(make_gate, scorer, weights):
    gate = make_gate(
        moe_scorer=scorer,
        moe_top_k_weights=weights,
        moe_scorer_dim=(12 if scorer in ("mlp", "gmm") else 256),
    )
    x = tokens(12).requires_grad_()
    names = [name for name, _ in gate.named_parameters()]

    def outputs(x, *parameters):
        values = dict(zip(names, parameters, strict=True))
        plan = torch.func.functional_call(gate, values, (x, GateContext()))
        return plan.weights_N, plan.aux["balance"]

    assert torch.autograd.gradcheck(outputs, (x, *gate.parameters()), fast_mode=True)


# Sampled picks


@pytest.mark.parametrize("scorer", ["linear", "sigmoid"])
def test_the_best_stay_and_the_drawn_follow_the_probabilities(make_gate, scorer):
    """One token many times: two of three picks are its best, the third is drawn from the rest."""
    count = 6000
    gate = make_gate(moe_top_k=3, moe_sample_top_k=1, moe_scorer=scorer)
    gate.scorer.weight.data.mul_(2)
    x = tokens(1).expand(count, D)
    picks = chosen(gate, x, keyed(count))
    scores = gate.scorer.scores(gate.score(x[:1]))[0].detach()
    order = scores.argsort(descending=True).tolist()
    drawn = [set(row) - set(order[:2]) for row in picks.tolist()]
    assert all(len(rest) == 1 for rest in drawn)  # the best two are among the picks
    seen = torch.zeros(E)
    for (e,) in drawn:
        seen[e] += 1
    rest = order[2:]
    expected = count * scores[rest] / scores[rest].sum()
    assert expected.min() > 20
    chi_square = ((seen[rest] - expected) ** 2 / expected).sum()
    freedom = len(rest) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5
    # Were they drawn evenly, this could not be.
    assert ((seen[rest] - count / len(rest)) ** 2 / (count / len(rest))).sum() > 100


def test_draws_are_without_replacement_and_by_the_keys(make_gate):
    gate, x = make_gate(moe_top_k=4, moe_sample_top_k=4), tokens()
    gate.scorer.weight.data.mul_(1e6)  # all but one probability is 0 in any precision
    picks = chosen(gate, x, keyed())
    assert picks.shape == (T, 4)
    assert torch.equal(picks, chosen(gate, x, keyed()))
    gate.scorer.weight.data.mul_(1e-6)
    other = GateContext(token_keys_T=sequence_keys(torch.full((1, T), 5))[0])
    assert not torch.equal(chosen(gate, x, keyed()), chosen(gate, x, other))


def test_nothing_is_drawn_in_evaluation_or_without_keys(make_gate):
    gate, x = make_gate(moe_top_k=3, moe_sample_top_k=2), tokens()
    best = gate.score(x).topk(3, dim=1).indices.sort(1).values
    assert not torch.equal(chosen(gate, x, keyed()), best)
    assert torch.equal(chosen(gate, x, GateContext()), best)
    assert torch.equal(chosen(gate.eval(), x, keyed()), best)


# Loss-free balancing


def update(gate, load):
    own = {st.REQUESTED_C: torch.tensor(load, dtype=torch.float64)}
    gate.after_update(1, own, {})


def test_the_bias_moves_by_its_rate_towards_an_even_load(make_gate):
    gate = make_gate(moe_bias_update_rate=0.25)
    assert gate.learns_after_updates
    update(gate, [60, 0, 10, 10, 9, -29])  # their mean is 10
    assert gate.bias_C.tolist() == [-0.25, 0.25, 0, 0, 0.25, 0.25]
    update(gate, [60, 0, 10, 10, 10, -30])
    assert gate.bias_C.tolist() == [-0.5, 0.5, 0, 0, 0.25, 0.5]


def test_without_a_rate_nothing_is_recorded(make_gate):
    gate = make_gate()
    assert not gate.learns_after_updates


def test_the_bias_chooses_but_does_not_weigh(make_gate):
    gate, x = make_gate(moe_bias_update_rate=0.5, moe_top_k=2), tokens()
    before = gate.route(x, GateContext())
    gate.bias_C[3] = 2  # above any score
    after = gate.route(x, GateContext())
    assert after.mask_TC[:, 3].all()
    assert not before.mask_TC[:, 3].all()
    for t in range(T):
        other = max((e for e in range(E) if e != 3), key=lambda e: float(before.probs_TC[t, e]))
        assert after.mask_TC[t].nonzero().squeeze(1).tolist() == sorted((3, other))
    assert torch.equal(after.weights_TC, before.weights_TC)
    assert torch.equal(after.probs_TC, before.probs_TC)
    assert torch.equal(after.logits_TC, before.logits_TC)


def test_the_bias_evens_out_the_load(make_layer):
    """From a gate that prefers one expert, 200 updates with steps of 0.01 come near to even."""
    layer = make_layer(moe_gate="top_k", moe_bias_update_rate=0.01, moe_top_k=1)
    x = torch.randn(400, 6, dtype=torch.float64)
    x[:, 0] = 1
    layer.gate.scorer.weight.data[2, 0] += 3

    def load():
        return layer(x)[2][st.REQUESTED_C]

    assert load()[2] > 400 / 2
    for n in range(200):
        layer.gate.after_update(n, {st.REQUESTED_C: load()}, {})
    assert load().max() < 1.3 * 400 / 5
    assert -1 < layer.gate.bias_C[2] < -0.2


def test_no_precision_loses_the_bias(make_gate):
    """In fp16, 0.001 added to 4 is lost."""
    gate = make_gate(moe_bias_update_rate=0.001).half()
    gate.bias_C.fill_(4)
    update(gate, [0, 20, 10, 10, 10, 10])
    assert gate.bias_C.tolist() == [4.001, 3.999, 4, 4, 4, 4]
    assert gate.state_dict()["bias_C"].tolist() == [4.001, 3.999, 4, 4, 4, 4]


def test_the_bias_stays_when_the_rate_is_set_to_0(make_gate):
    """As DeepSeek-V3's last phase, and evaluation with other options."""
    gate, x = make_gate(moe_bias_update_rate=0.5), tokens()
    update(gate, [60, 0, 10, 10, 9, -29])
    later = make_gate()
    later.load_state_dict(gate.state_dict())
    assert torch.equal(chosen(later, x, GateContext()), chosen(gate, x, GateContext()))
    assert not torch.equal(chosen(make_gate(), x, GateContext()), chosen(gate, x, GateContext()))


def test_renormalized_weights_of_unlikely_picks_sum_to_1(make_gate):
    gate = make_gate(moe_scorer="sigmoid", moe_top_k_weights="renormalized", moe_top_k=2)
    with torch.no_grad():
        gate.scorer.weight.copy_(-torch.arange(90, 90 + E * D).view(E, D) * 1.0)
    choice = gate.route(torch.ones(1, D), GateContext())
    weights = choice.weights_TC[choice.mask_TC]
    assert weights.sum().item() == pytest.approx(1)
    assert choice.probs_TC.sum().item() == pytest.approx(1)


def test_saturated_scores_are_still_told_apart(make_gate):
    gate = make_gate(moe_scorer="sigmoid", moe_top_k=1)
    with torch.no_grad():
        gate.scorer.weight.zero_()
        gate.scorer.weight[:4, 0] = torch.tensor([20.0, 30.0, 25.0, -1.0])
    x = torch.zeros(1, D)
    x[0, 0] = 1
    assert gate.route(x, GateContext()).mask_TC[0].nonzero().tolist() == [[1]]


# Null experts and capacity


def test_null_experts_are_candidates(make_gate):
    gate, x = make_gate(num_null=3, moe_top_k=2, moe_top_k_weights="renormalized"), tokens()
    probs = (x @ gate.scorer.weight.T).softmax(1)
    plan = gate(x, GateContext())
    kept, null_mass = torch.zeros(T), torch.zeros(T).double()
    for t in range(T):
        picks = probs[t].topk(2).indices.tolist()
        kept[t] = sum(e < E for e in picks)
        null_mass[t] = sum(probs[t, e] for e in picks if e >= E) / probs[t, picks].sum()
    assert set(kept.tolist()) == {0, 1, 2}
    assert torch.equal(plan.token_ids_N.bincount(minlength=T).float(), kept)
    assert torch.allclose(plan.null_mass_T, null_mass)
    assert plan.stats[st.NULL_PAIRS] == 2 * T - kept.sum()


def test_batch_prioritized_routing_lets_the_surest_tokens_go_first(make_layer):
    layer = make_layer(
        moe_gate="top_k", moe_capacity_factor=0.5, moe_batch_prioritized_routing=True
    )
    x = torch.randn(T, 6, dtype=torch.float64)
    asked = layer.gate(x, GateContext())
    kept = layer._within_capacity(asked)
    probs = layer.gate.route(x, GateContext()).probs_TC
    for e in range(5):
        wanted = asked.token_ids_N[asked.expert_ids_N == e].tolist()
        wanted.sort(key=lambda t: -float(probs[t].max()))
        got = kept.token_ids_N[kept.expert_ids_N == e].tolist()
        assert got == sorted(wanted[:8])  # ceil(0.5 * 80 / 5)


# Options


@pytest.mark.parametrize(
    "given, message",
    [
        ({"moe_top_k": 0}, "--moe-top-k 0: give 1 or more"),
        ({"moe_top_k": 17}, "--moe-top-k 17: an MoE layer has 16 candidates"),
        (
            {"moe_top_k": 5, "moe_expert_count": "4,8"},
            "--moe-top-k 5: an MoE layer has 4 candidates",
        ),
        ({"moe_top_k_weights": "soft"}, "--moe-top-k-weights soft: one of: raw, renormalized"),
        ({"moe_sample_top_k": 3}, r"--moe-sample-top-k 3: give 0 to --moe-top-k \(2\)"),
        ({"moe_sample_top_k": -1}, "--moe-sample-top-k -1: "),
        ({"moe_bias_update_rate": -0.1}, "--moe-bias-update-rate -0.1: scores are at most 1"),
        ({"moe_bias_update_rate": float("inf")}, "--moe-bias-update-rate inf: "),
        (
            {"moe_batch_prioritized_routing": True},
            "--moe-batch-prioritized-routing True: experts have no capacity in training",
        ),
        (
            {"moe_batch_prioritized_routing": True, "moe_eval_capacity_factor": 1.0},
            "--moe-batch-prioritized-routing True: experts have no capacity in training",
        ),
        (
            {
                "moe_batch_prioritized_routing": True,
                "moe_capacity_factor": 1.0,
                "moe_drop_policy": "random",
            },
            "--moe-drop-policy random: ",
        ),
        ({"moe_scorer": "quadratic"}, "--moe-scorer quadratic: .*unknown scorer"),
        ({"moe_scorer_dim": 16}, "--moe-scorer-dim 16: the scorer linear has no hidden width"),
        ({"moe_scorer": "gmm", "moe_scorer_dropout": 0.1}, "--moe-scorer-dropout 0.1: "),
    ],
)
def test_what_it_refuses(moe_options, given, message):
    with pytest.raises(OptionError, match=message):
        validate(moe_options(moe_gate="top_k", **given))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"moe_top_k": 1, "moe_top_k_weights": "renormalized"}, "the weight is always 1"),
        ({"moe_capacity_factor": 1.0, "moe_batch_prioritized_routing": True}, "not causal"),
    ],
)
def test_what_it_warns_of(moe_options, caplog, given, message):
    with caplog.at_level(logging.WARNING):
        validate(moe_options(moe_gate="top_k"))
        assert not caplog.messages
        validate(moe_options(moe_gate="top_k", **given))
    assert [message in text for text in caplog.messages] == [True]


def test_null_experts_make_room_for_picks(moe_options):
    validate(moe_options(moe_gate="top_k", moe_top_k=3, moe_expert_count="2", moe_null_experts=1))
