import math

import pytest
import torch

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.top_any import TopAnyGate
from evomoe_plugin.layer import build_layer
from evomoe_plugin.routing import losses
from evomoe_plugin.routing import stats as st

T, D, E, ACTIVE = 30, 8, 6, 4


@pytest.fixture
def make_gate(moe_options):
    """An fp64 gate with 4 of its 6 experts active, and thresholds at both sides of 0."""

    def make(start=ACTIVE, **given):
        gate = TopAnyGate(LayerInfo(D, E, start_experts=start), moe_options(**given)).double()
        with torch.no_grad():
            gate.weight.mul_(torch.linspace(0.5, 2, E).unsqueeze(1))
            gate.threshold.copy_(torch.tensor([0.1, -0.1, 0.2, 0.3, -5.0, -5.0]))
        return gate

    return make


def tokens(count=T):
    return torch.randn(count, D, dtype=torch.float64)


def dense(plan, values_N, count=T):
    out = torch.zeros(count, E, dtype=torch.float64)
    return out.index_put((plan.token_ids_N, plan.expert_ids_N), values_N)


def by_hand(gate, x_TD, scale, by_score):
    """Weights, token by token and expert by expert."""
    rows = []
    for x in x_TD.tolist():
        score, reached = {}, []
        for e in range(E):
            if not gate.active_E[e]:
                continue
            w, g = gate.weight[e].tolist(), float(gate.threshold[e])
            cosine = sum(a * b for a, b in zip(x, w, strict=True)) / (
                math.hypot(*x) * math.hypot(*w)
            )
            score[e] = 1 / (1 + math.exp(-scale * cosine))
            if score[e] > 1 / (1 + math.exp(-scale * g)):
                reached.append(e)
        if not reached and not gate.training:
            reached = [max(score, key=score.get)]
        total = sum(score[e] for e in reached) if by_score else len(reached)
        rows.append(
            [0.0 if e not in reached else (score[e] if by_score else 1) / total for e in range(E)]
        )
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("weights", ["uniform", "score"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_the_formula(make_gate, weights, training, learned):
    gate = make_gate(
        moe_top_any_weights=weights, moe_top_any_scale=3.0, moe_top_any_learned_scale=learned
    ).train(training)
    x = tokens()
    plan = gate(x, GateContext())
    wanted = by_hand(gate, x, 3.0, weights == "score")
    assert torch.allclose(dense(plan, plan.weights_N), wanted, atol=1e-12)
    per_token = wanted.gt(0).sum(1)
    assert {0, 1, 2} <= set(per_token.tolist()) if training else per_token.min() == 1
    assert not plan.tokens_per_expert_E[ACTIVE:].any()


class StraightThrough(torch.autograd.Function):
    """1 where x > 0, else 0, with the gradient of x."""

    @staticmethod
    def forward(ctx, x):
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


def indicators(gate, x, ste):
    """g and the scores. DynMoE applies the straight-through estimator after a relu."""
    normal, scale = torch.nn.functional.normalize, gate._scale(x.dtype)
    scores = torch.sigmoid(scale * normal(x) @ normal(gate.weight).T)
    margins = scores - torch.sigmoid(scale * gate.threshold)
    margins = (margins.relu() if ste == "active" else margins) * gate.active_E
    return StraightThrough.apply(margins), scores


@pytest.mark.parametrize("weights", ["uniform", "score"])
@pytest.mark.parametrize("ste", ["full", "active"])
def test_the_straight_through_gradient(make_gate, weights, ste):
    gate = make_gate(
        moe_top_any_weights=weights,
        moe_top_any_ste=ste,
        moe_top_any_learned_scale=True,
        moe_top_any_scale=2.0,
    )
    x = tokens().requires_grad_()
    plan = gate(x, GateContext())
    g, scores = indicators(gate, x, ste)
    if weights == "uniform" and ste == "active":
        k = g.detach().to(torch.int64).sum(1, keepdim=True)
        wanted = g / k.clamp(min=1)
    else:
        u = g * scores if weights == "score" else g
        total = u.sum(1, keepdim=True)
        wanted = u / torch.where(total > 0, total, 1.0)
    assert torch.allclose(dense(plan, plan.weights_N), wanted * g, atol=1e-15)
    seed_N = torch.randn_like(plan.weights_N)
    learned = [gate.weight, gate.threshold, gate.log_scale, x]
    got = torch.autograd.grad(plan.weights_N @ seed_N, learned)
    for a, b in zip(
        got, torch.autograd.grad((wanted * dense(plan, seed_N)).sum(), learned), strict=True
    ):
        assert b.any()
        assert torch.allclose(a, b, atol=1e-12)
    assert not got[0][ACTIVE:].any()
    assert not got[1][ACTIVE:].any()
    assert got[1][:ACTIVE].all()


def test_only_full_moves_experts_that_no_token_reached(make_gate):
    for ste, moves in (("full", True), ("active", False)):
        gate = make_gate(moe_top_any_ste=ste)
        with torch.no_grad():
            gate.threshold[2] = 1.0  # a cosine of 1 does not exceed it
        plan = gate(tokens(), GateContext())
        assert plan.tokens_per_expert_E[2] == 0
        (plan.weights_N @ torch.randn_like(plan.weights_N)).backward()
        assert bool(gate.threshold.grad[2] != 0) == moves
        assert bool(gate.weight.grad[2].any()) == moves


def test_far_out_scores_are_still_told_apart(make_gate):
    """sigmoid(50) and sigmoid(40) are both 1 in fp32."""
    gate = make_gate(start=0, moe_top_any_scale=100.0).float()
    with torch.no_grad():
        gate.threshold.fill_(0.4)
        x = torch.nn.functional.normalize(gate.weight[:1]) * 0.5 + 0
        orthogonal = torch.nn.functional.normalize(gate.weight[1:2])
        x = x + orthogonal * 0.75**0.5  # cosine 0.5 to expert 0, 0.87 to expert 1
    assert dense(gate(x, GateContext()), torch.ones(2, dtype=torch.float64), 1).tolist() == [
        [1, 1, 0, 0, 0, 0]
    ]


def test_the_scale_is_at_most_100(make_gate):
    gate = make_gate(moe_top_any_learned_scale=True)
    x = tokens()
    with torch.no_grad():
        gate.log_scale.fill_(50.0)
    choice = gate.route(x, GateContext())
    cosine = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(gate.weight).T
    assert torch.allclose(choice.logits_TC, 100 * cosine)


def test_initialisation(moe_options):
    gate = TopAnyGate(LayerInfo(D, E), moe_options())
    assert torch.allclose(gate.weight @ gate.weight.T, torch.eye(E), atol=1e-6)
    assert not gate.threshold.any()
    assert gate.active().all()
    assert gate.log_scale is None
    learned = TopAnyGate(
        LayerInfo(D, E), moe_options(moe_top_any_learned_scale=True, moe_top_any_scale=10.0)
    )
    assert learned.log_scale.exp().item() == pytest.approx(10)


def test_efficiency(make_gate):
    gate = make_gate(moe_aux="efficiency=1")
    x, real = tokens(), torch.rand(T) < 0.7
    x[~real] = float("nan")
    plan = gate(x, GateContext(token_mask_T=real))
    wanted = plan.num_pairs / (int(real.sum()) * ACTIVE)
    assert plan.aux["efficiency"].item() == pytest.approx(wanted, rel=1e-12)
    gate.threshold.grad = None
    plan.aux["efficiency"].backward(inputs=[gate.threshold])
    # d mean(s - th) / d g_e = -sigmoid'(g_e) / experts, of every active expert.
    th = torch.sigmoid(gate.threshold.detach())
    assert torch.allclose(gate.threshold.grad, -th * (1 - th) / ACTIVE * gate.active_E)


@pytest.mark.parametrize("ste", ["full", "active"])
@pytest.mark.parametrize("weighted", [False, True])
def test_balance_is_that_of_dynmoe(make_gate, weighted, ste):
    """E sum_e mean(g_e / sum g) mean(g_e) over active experts and tokens that have one."""
    gate = make_gate(moe_aux="balance=1", moe_top_any_ste=ste)
    x, weights = tokens(), torch.rand(T, dtype=torch.float64) if weighted else None
    plan = gate(x, GateContext(token_weights_T=weights))
    mask = dense(plan, torch.ones_like(plan.weights_N))
    routed = mask.sum(1) > 0
    assert not routed.all()
    mask, g = mask[routed, :ACTIVE], indicators(gate, x, ste)[0][routed, :ACTIVE]
    share = g / g.sum(1, keepdim=True)
    w = torch.ones(len(mask), dtype=torch.float64) if weights is None else weights[routed]
    w = w / w.sum()
    wanted = ACTIVE * ((w @ share) * (w @ mask)).sum()
    assert plan.aux["balance"].item() == pytest.approx(wanted.item(), rel=1e-12)
    learned = [gate.weight, gate.threshold]
    for a, b in zip(
        torch.autograd.grad(plan.aux["balance"], learned),
        torch.autograd.grad(wanted, learned),
        strict=True,
    ):
        assert b.any()
        assert torch.allclose(a, b, atol=1e-14)


def test_diversity_and_simplicity_are_of_active_experts(make_gate):
    gate = make_gate()
    assert gate.aux_names == ("diversity", "simplicity")
    with torch.no_grad():
        gate.weight[ACTIVE:] = 1e3
    aux = gate(tokens(), GateContext()).aux
    rows = gate.weight[:ACTIVE]
    assert torch.equal(aux["diversity"], losses.diversity_loss(vectors_CD=rows))
    assert torch.equal(aux["simplicity"], losses.simplicity_loss(vectors_CD=rows))


def test_statistics_are_of_active_experts(make_gate):
    gate = make_gate()
    with torch.no_grad():
        gate.threshold[0] = 1.0
    stats = gate(tokens(), GateContext()).stats
    assert stats[st.EXPERTS] == T * ACTIVE
    numbers = st.summarize(
        {
            name: stats[name].unsqueeze(0)
            for name in (st.TOKENS, st.PAIRS, st.LOAD_E, st.EXPERTS, st.ENTROPY, st.NONFINITE)
        }
    )
    assert numbers["dead_experts"] == pytest.approx(1 / ACTIVE)
    assert numbers["active_experts"] == ACTIVE
    load = stats[st.LOAD_E]
    assert numbers["load_max"] == pytest.approx(float(load.max() * ACTIVE / load.sum()))


def test_capacity_is_shared_by_active_experts(moe_options):
    options = moe_options(
        moe_gate="top_any",
        decoder_embed_dim=D,
        moe_expert_count="2",
        moe_max_experts=E,
        moe_capacity_factor=1.0,
    )
    layer = build_layer(LayerInfo(D, E, start_experts=2), options, torch.nn.functional.gelu)
    x = torch.randn(400, D)
    asked = layer.gate(x, GateContext())
    kept = layer._within_capacity(asked)
    assert asked.tokens_per_expert_E[0] != asked.tokens_per_expert_E[1]
    assert kept.tokens_per_expert_E.max() == math.ceil(asked.num_pairs / 2)


def test_records_come_with_the_statistics(make_gate):
    gate = make_gate(moe_adapt_record_interval=4, moe_adapt_window=1, moe_max_experts=E)
    x = tokens()
    assert gate.learns_after_updates
    assert not any(
        gate(x, GateContext(num_updates=2)).stats[name].any()
        for name in gate.record.zeros(x.device)
    )
    plan = gate(x, GateContext(num_updates=3))
    gate.after_update(4, plan.stats, {})
    mask = dense(plan, torch.ones_like(plan.weights_N)).bool()
    assert torch.equal(gate.record.routed_E, mask.sum(0))
    assert torch.allclose(gate.record.unrouted_sum_D, x[~mask.any(1)].sum(0))
    assert gate.record.unrouted == (~mask.any(1)).sum() > 0


@pytest.mark.parametrize(
    "given, option",
    [
        ({"moe_top_any_ste": "none"}, "moe-top-any-ste"),
        ({"moe_top_any_weights": "raw"}, "moe-top-any-weights"),
        ({"moe_top_any_scale": 0.0}, "moe-top-any-scale"),
        ({"moe_top_any_scale": 101.0}, "moe-top-any-scale"),
        ({"moe_top_any_scale": float("nan")}, "moe-top-any-scale"),
        ({"moe_max_experts": -1}, "moe-max-experts"),
        ({"moe_max_experts": 3}, "moe-max-experts"),
        ({"moe_expert_count": "2:8", "moe_max_experts": 7}, "moe-max-experts"),
        ({"moe_adapt_record_interval": -1}, "moe-adapt-record-interval"),
        ({"moe_adapt_record_interval": 10}, "moe-adapt-record-interval"),
        ({"moe_adapt_record_interval": 10, "moe_max_experts": 4}, "moe-adapt-record-interval"),
        ({"moe_adapt_window": 5}, "moe-adapt-window"),
        ({"moe_adapt_window": -5}, "moe-adapt-window"),
        (
            {"moe_adapt_record_interval": 10, "moe_max_experts": 8, "moe_adapt_window": 11},
            "moe-adapt-window",
        ),
        ({"moe_adapt_source": "random"}, "moe-adapt-source"),
        ({"moe_adapt_noise": -0.1}, "moe-adapt-noise"),
        ({"moe_adapt_noise": 0.1, "moe_adapt_source": "keep"}, "moe-adapt-noise"),
        ({"moe_null_experts": 1}, "moe-null-experts"),
        ({"moe_aux": "z=0.1"}, "moe-aux"),
        ({"moe_gate": "top_k", "moe_max_experts": 8}, "moe-max-experts"),
        ({"moe_gate": "top_k", "moe_adapt_record_interval": 8}, "moe-adapt-record-interval"),
        ({"moe_gate": "top_k", "moe_top_any_scale": 8.0}, "moe-top-any-scale"),
    ],
)
def test_bad_options_are_refused_by_name(moe_options, given, option):
    with pytest.raises(OptionError, match=f"^--{option} .*: .*(give|leave|one of)"):
        validate(moe_options(**{"moe_gate": "top_any", "moe_expert_count": "4", **given}))


def test_room_that_nothing_fills_is_a_warning(moe_options, caplog):
    validate(moe_options(moe_gate="top_any", moe_expert_count="4", moe_max_experts=8))
    assert "begin_record_routing" in caplog.text


@pytest.mark.parametrize("loss", ["switch", "importance", "balance", "mi"])
def test_losses_do_not_count_empty_places(make_layer, loss):
    given = {"moe_gate": "top_any", "num_experts": 4, "moe_aux": loss}
    full = make_layer(**given)
    roomy = make_layer(**{**given, "num_experts": 8}, moe_max_experts=8)
    with torch.no_grad():
        roomy.gate.active_E[4:] = False
        roomy.gate.weight[:4] = full.gate.weight
    x = torch.randn(30, full.gate.info.model_dim, dtype=torch.float64)
    assert torch.allclose(full(x)[1], roomy(x)[1])
