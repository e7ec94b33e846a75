import logging

import pytest
import torch

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.experts.reference import one_expert
from evomoe_plugin.gates import GateContext, LayerInfo
from evomoe_plugin.gates import top_p as top_p_module
from evomoe_plugin.gates.top_p import TopPGate
from evomoe_plugin.routing.noise import sequence_keys

T, D, E = 40, 6, 5


@pytest.fixture
def make_gate(moe_options):
    def make(num_null=0, **given):
        info = LayerInfo(D, E, num_null=num_null)
        return TopPGate(info, moe_options(moe_null_experts=num_null, **given)).double()

    return make


def keys(count=T):
    return sequence_keys(torch.arange(count).unsqueeze(0))[0]


def tokens(count=T):
    return 2 * torch.randn(count, D, dtype=torch.float64)


def smallest_set(probs, top_p):
    """Candidates of one token in descending order until their probability reaches `top_p`."""
    order = sorted(range(len(probs)), key=lambda c: -probs[c])
    picks, reached = [], 0.0
    for c in order:
        if picks and reached >= top_p and top_p < 1:
            break
        picks.append(c)
        reached += probs[c]
    return picks


# The set and its weights


@pytest.mark.parametrize("top_p", [1e-9, 0.45, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("weights", ["softmax", "uniform"])
@pytest.mark.parametrize("num_null", [0, 3])
@pytest.mark.parametrize("training", [True, False])
def test_it_equals_the_loop(make_gate, top_p, weights, num_null, training):
    gate = make_gate(num_null, moe_top_p=top_p, moe_top_p_weights=weights).train(training)
    x = tokens()
    plan = gate(x, GateContext(token_keys_T=keys()))
    got = torch.zeros(T, E, dtype=torch.float64)
    got[plan.token_ids_N, plan.expert_ids_N] = plan.weights_N.detach()
    sizes = set()
    for t in range(T):
        probs = (gate.scorer.weight @ x[t]).softmax(0).tolist()
        picks = smallest_set(probs, top_p)
        sizes.add(len(picks))
        total = sum(probs[c] for c in picks)
        share = {c: probs[c] / total if weights == "softmax" else 1 / len(picks) for c in picks}
        wanted = torch.tensor([share.get(e, 0.0) for e in range(E)], dtype=torch.float64)
        assert torch.allclose(got[t], wanted, atol=1e-9)
        if num_null:
            null = sum(share.get(c, 0.0) for c in range(E, E + num_null))
            assert plan.null_mass_T[t].item() == pytest.approx(null)
    if top_p == 1:
        assert sizes == {E + num_null}
    elif top_p < 0.1:
        assert sizes == {1}
    else:
        assert len(sizes) > 1


def test_top_p_0_is_top_k(make_gate):
    x = tokens()
    choice = make_gate(moe_top_p=0.0, moe_top_k=3).route(x, GateContext())
    assert torch.equal(
        choice.mask_TC.nonzero()[:, 1].view(T, 3),
        choice.logits_TC.topk(3, dim=1).indices.sort(1).values,
    )


@pytest.mark.parametrize("weights", ["softmax", "uniform", "sparsemixer"])
@pytest.mark.parametrize("top_p", [1e-9, 0.7, 1 - 1e-9, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1e4, 1e30])
@pytest.mark.parametrize("training", [True, False])
def test_equal_and_huge_logits(make_gate, weights, top_p, scale, training):
    """No NaN, at least one pick and never more than there are, which as published one may ask."""
    gate = make_gate(1, moe_top_p=top_p, moe_top_p_weights=weights).float().train(training)
    x = torch.full((T, D), scale, requires_grad=True)
    plan = gate(x, GateContext(token_keys_T=keys()))
    picks = plan.stats["requested"].sum() / T
    assert 1 <= picks <= E + 1
    if top_p == 1 or (scale == 0 and top_p > 0.9):
        assert picks == E + 1
    sums = torch.zeros(T).index_add(0, plan.token_ids_N, plan.weights_N) + plan.null_mass_T
    assert torch.allclose(sums, torch.ones(T))
    (plan.weights_N.sum() + plan.aux["switch"]).backward()
    assert gate.scorer.weight.grad.isfinite().all()


@pytest.mark.parametrize("weights", ["softmax", "sparsemixer"])
def test_probabilities_that_do_not_sum_to_p(moe_options, weights):
    """All of them rounded may be less than P; there is no candidate beyond the last one."""
    gate = TopPGate(LayerInfo(D, 64), moe_options(moe_top_p=1 - 1e-9, moe_top_p_weights=weights))
    x = 0.1 * torch.randn(300, D)
    choice = gate.route(x, GateContext(token_keys_T=keys(300)))
    short = choice.probs_TC.sort(1, descending=True).values.cumsum(1)[:, -1] < gate.top_p
    assert short.any()
    assert choice.mask_TC[short].all()
    sums = (choice.weights_TC * choice.mask_TC).sum(1)
    assert torch.allclose(sums, torch.ones_like(sums))


@pytest.mark.parametrize("weights", ["softmax", "uniform"])
def test_gradcheck(make_gate, weights):
    gate, x = make_gate(2, moe_top_p_weights=weights), tokens().requires_grad_()

    def outputs(x, weight):
        plan = torch.func.functional_call(gate, {"scorer.weight": weight}, (x, GateContext()))
        return (plan.aux["switch"], *([plan.weights_N] if plan.weights_N.requires_grad else []))

    assert len(outputs(x, gate.scorer.weight)) == (1 if weights == "uniform" else 2)
    assert torch.autograd.gradcheck(outputs, (x, gate.scorer.weight), fast_mode=True)


# Null and shared experts


def test_tokens_that_go_to_null_experts_alone_cost_nothing(make_layer):
    layer = make_layer(moe_gate="top_p", moe_null_experts=1)
    x = tokens().abs()
    tired = torch.rand(T) < 0.5
    x[:, 0] = torch.where(tired, 50.0, -50.0)
    layer.gate.scorer.weight.data[E, 0] = 10
    rows = []
    layer.experts.register_forward_pre_hook(lambda _, given: rows.append(given[1].num_pairs))
    y, _, _ = layer(x)
    busy_y, _, _ = layer(x[~tired])
    layer(x[tired])
    assert 0 < tired.sum() < T
    assert torch.equal(y[tired], torch.zeros_like(y[tired]))
    assert torch.allclose(y[~tired], busy_y)
    assert rows == [rows[1], rows[1], 0]
    assert rows[1] >= (~tired).sum()


@pytest.mark.parametrize("weights", ["softmax", "uniform"])
def test_shared_experts_are_weighed_as_in_dcmoe(make_layer, weights):
    """q = softmax over the chosen D (nulls too) and the shared: y = q(D) Σ w_e f_e + Σ q_s g_s."""
    layer = make_layer(
        moe_gate="top_p",
        moe_null_experts=2,
        moe_shared_experts=2,
        moe_shared_combine="softmax",
        moe_shared_ffn_dim=7,
        moe_top_p_weights=weights,
    )
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    y, _, _ = layer(x)
    rows, nulls = [], 0
    for t in range(T):
        logits = layer.gate.scorer.weight @ x[t]
        shared_logits = layer.gate.shared_weights.weight @ x[t]
        probs = logits.softmax(0)
        picks = smallest_set(probs.tolist(), 0.7)
        q = torch.cat([logits[picks], shared_logits]).softmax(0)
        routed = q[: len(picks)].sum()
        row = sum(q[len(picks) + s] * one_expert(x[t], layer.shared.experts, s) for s in range(2))
        for c in picks:
            w = probs[c] / probs[picks].sum() if weights == "softmax" else 1 / len(picks)
            if c < E:
                row = row + routed * w * one_expert(x[t], layer.experts, c)
            else:
                nulls += 1
        rows.append(row)
    wanted = torch.stack(rows)
    assert nulls > 0
    assert torch.allclose(y, wanted, atol=1e-9)
    parameters = [x, *layer.parameters()]
    seed = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, parameters, seed),
        torch.autograd.grad(wanted, parameters, seed),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-9)


def test_shared_experts_are_never_capped(make_layer):
    """In DCMoE the policy `position` masked shared experts too, and tokens became NaN."""
    layer = make_layer(
        moe_gate="top_p",
        moe_shared_experts=2,
        moe_shared_combine="softmax",
        moe_capacity_factor=0.3,
    )
    x = tokens()
    plan = layer._within_capacity(layer.gate(x, GateContext()))
    left = plan.token_ids_N.bincount(minlength=T) == 0
    assert left.any()
    assert (plan.shared_weights_TS[left] > 0).all()
    assert layer(x)[0].isfinite().all()
    assert (layer(x)[0][left].abs().sum(1) > 0).all()


# Jitter


def test_jitter_is_seen_by_the_gate_alone(make_layer, monkeypatch):
    drawn = torch.rand(T, D, dtype=torch.float64)
    monkeypatch.setattr(top_p_module, "uniform", lambda keys_T, columns: drawn[:, :columns])
    layer = make_layer(moe_gate="top_p", moe_jitter=0.3)
    x = tokens()
    before, rows = x.clone(), []
    layer.experts.register_forward_pre_hook(lambda _, given: rows.append(given[0]))
    layer(x, token_keys_T=keys())
    assert torch.equal(x, before)
    assert rows[0] is x
    choice = layer.gate.route(x, layer.context(token_keys_T=keys()))
    noisy = x * (1 + 0.3 * (2 * drawn - 1))
    assert torch.allclose(choice.logits_TC, noisy @ layer.gate.scorer.weight.T)


def test_jitter_stays_within_its_bounds_and_out_of_evaluation(make_gate):
    gate = make_gate(moe_jitter=0.1)
    gate.scorer.weight.data = torch.eye(E, D).double()
    x = torch.ones(2000, D, dtype=torch.float64)
    context = GateContext(token_keys_T=keys(2000))
    logits = gate.route(x, context).logits_TC
    assert 0.9 < logits.min() < 0.901
    assert 1.099 < logits.max() < 1.1
    assert abs(logits.mean() - 1) < 0.005
    for quiet in (gate.route(x, GateContext()), gate.eval().route(x, context)):
        assert torch.equal(quiet.logits_TC, x[:, :E])


# SparseMixer


def near_ties(gate):
    """Weights with which all logits of a token lie within a few per cent."""
    with torch.no_grad():
        gate.scorer.weight.copy_(1 + 0.02 * torch.randn_like(gate.scorer.weight))
    return torch.rand(T, D, dtype=torch.float64) + 0.5


def sparsemixer_by_hand(logits, picks, noise, chance):
    """One token: picks and values c q, and the gradient of each value by the logits, q(1 - q)."""
    left, chosen, values, slopes = list(range(len(logits))), [], [], []
    for r in range(picks):
        largest = max(logits[c] for c in left)
        near = [c for c in left if largest - logits[c] <= 0.02 * max(abs(largest), abs(logits[c]))]
        pick = max(near, key=lambda c: logits[c] + (0.0 if noise is None else float(noise[r][c])))
        q = torch.tensor([logits[c] for c in near], dtype=torch.float64).softmax(0).tolist()
        value = q[near.index(pick)]
        slope = torch.zeros(len(logits), dtype=torch.float64)
        for c, share in zip(near, q, strict=True):
            slope[c] = value * ((c == pick) - share)
        scale = 1.0
        if noise is not None and logits[pick] < largest and float(chance[r]) <= 0.75:
            scale = 1 / 3
        chosen.append(pick)
        values.append(scale * value)
        slopes.append(slope)
        left.remove(pick)
    return chosen, values, slopes


@pytest.mark.parametrize("training", [True, False])
def test_sparsemixer_forward_and_backward_as_stated(make_gate, monkeypatch, training):
    gate = make_gate(1, moe_top_p_weights="sparsemixer", moe_top_p=0.8).train(training)
    x = near_ties(gate)
    C = E + 1
    noise, chance = torch.randn(C, T, C, dtype=torch.float64), torch.rand(C, T)
    turns = {"noise": iter(noise), "chance": iter(chance)}
    monkeypatch.setattr(top_p_module, "gumbel", lambda keys_T, columns: next(turns["noise"]))
    monkeypatch.setattr(
        top_p_module, "uniform", lambda keys_T, columns: next(turns["chance"]).unsqueeze(1)
    )
    choice = gate.route(x, GateContext(token_keys_T=keys()))
    seed = torch.randn(T, C, dtype=torch.float64)
    (got,) = torch.autograd.grad(
        (choice.weights_TC * choice.mask_TC * seed).sum(), choice.logits_TC
    )
    logits = choice.logits_TC.detach()
    scaled = orders = 0
    for t in range(T):
        picks = len(smallest_set(logits[t].softmax(0).tolist(), 0.8))
        chosen, values, slopes = sparsemixer_by_hand(
            logits[t].tolist(), picks, noise[:, t] if training else None, chance[:, t]
        )
        assert choice.mask_TC[t].nonzero().squeeze(1).tolist() == sorted(chosen)
        total = sum(values)
        wanted = torch.tensor([value / total for value in values], dtype=torch.float64)
        assert torch.allclose(choice.weights_TC[t, chosen], wanted)
        mean = sum(float(seed[t, c]) * w for c, w in zip(chosen, wanted.tolist(), strict=True))
        gradient = sum(
            (float(seed[t, c]) - mean) / total * slope
            for c, slope in zip(chosen, slopes, strict=True)
        )
        assert torch.allclose(got[t], gradient, atol=1e-9)
        best = logits[t].topk(picks).indices.tolist()
        orders += chosen != best
        scaled += any(abs(v - 1 / 3) < 1e-9 or v < 1 / C for v in values)
    assert got.abs().max() > 1e-3
    assert (orders > 0) == training  # near ties are drawn, but the best ones in evaluation
    assert scaled > 0 or not training


def test_sparsemixer_draws_among_near_ties_only(make_gate):
    count = 4000
    gate = make_gate(moe_top_p_weights="sparsemixer", moe_top_p=1e-9)
    gate.scorer.weight.data.zero_()
    logits = torch.tensor([2.0, 1.97, 1.5, 1.99, -3.0], dtype=torch.float64)
    gate.scorer.weight.data[:, 0] = logits
    x = torch.ones(count, D, dtype=torch.float64)
    choice = gate.route(x, GateContext(token_keys_T=keys(count)))
    seen = choice.mask_TC.sum(0)
    near = [0, 1, 3]
    expected = count * logits[near].softmax(0)
    assert seen.sum() == count
    assert seen[[2, 4]].tolist() == [0, 0]
    assert ((seen[near] - expected) ** 2 / expected).sum() < 2 + 4 * 2


def test_sparsemixer_scales_a_third_with_chance_three_quarters():
    """On average what Heun's third-order method weighs: 1/4 whole, 3/4 a third."""
    count = 20000
    logits = torch.tensor([[1.0, 0.99]], dtype=torch.float64).expand(count, 2)
    picks = torch.ones(count, 1, dtype=torch.int64)
    mask, values = top_p_module.sparsemixer(logits, picks, keys(count))
    q = logits[0].softmax(0)
    second = values[mask[:, 1], 1]
    assert torch.allclose(values[mask[:, 0], 0], q[0])
    whole = torch.isclose(second, q[1])
    assert torch.allclose(second[~whole], q[1] / 3)
    deviation = (0.25 * 0.75 / whole.numel()) ** 0.5
    assert abs(whole.double().mean() - 0.25) < 4 * deviation


def test_the_published_weights_are_uniform_without_near_ties(make_gate):
    """Hence the warning: there is no gradient through them."""
    gate = make_gate(moe_top_p_weights="sparsemixer")
    gate.scorer.weight.data = torch.eye(E, D).double()
    x = torch.rand(T, D, dtype=torch.float64).argsort(1).double()
    choice = gate.route(x, GateContext(token_keys_T=keys()))
    uniform = 1 / choice.mask_TC.sum(1, keepdim=True).double()
    assert torch.allclose(choice.weights_TC, uniform * choice.mask_TC)
    (grad,) = torch.autograd.grad(choice.weights_TC.square().sum(), gate.scorer.weight)
    assert not grad.any()


# Options


@pytest.mark.parametrize(
    "given, message",
    [
        ({"moe_top_p": -0.1}, "--moe-top-p -0.1: it is a probability"),
        ({"moe_top_p": 1.5}, "--moe-top-p 1.5: it is a probability"),
        ({"moe_top_p": float("nan")}, "--moe-top-p nan: it is a probability"),
        ({"moe_top_p": 0.0, "moe_top_k": 17}, "--moe-top-k 17: an MoE layer has 16 candidates"),
        ({"moe_top_p": 0.0, "moe_top_k": 0}, "--moe-top-k 0: give 1 or more"),
        ({"moe_top_p_weights": "raw"}, "--moe-top-p-weights raw: one of: softmax, uniform"),
        ({"moe_jitter": -0.01}, "--moe-jitter -0.01: give 0 or more and less than 1"),
        ({"moe_jitter": 1.0}, "--moe-jitter 1.0: give 0 or more and less than 1"),
        (
            {"moe_top_k_weights": "renormalized"},
            "--moe-top-k-weights renormalized: the gate top_p does not use it",
        ),
        ({"moe_scorer": "sigmoid"}, "--moe-scorer sigmoid: with --moe-gate top_p one of"),
        ({"moe_null_experts": -1}, "--moe-null-experts -1: "),
    ],
)
def test_what_it_refuses(moe_options, given, message):
    with pytest.raises(OptionError, match=message):
        validate(moe_options(moe_gate="top_p", **given))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"moe_top_k": 3}, "--moe-top-p 0.7 determines how many"),
        ({"moe_top_p": 0.0, "moe_top_k": 1}, "the weight of the one selected candidate is 1"),
        ({"moe_top_p_weights": "uniform"}, "learns only from auxiliary losses"),
        ({"moe_top_p_weights": "sparsemixer"}, "near ties"),
    ],
)
def test_what_it_warns_of(moe_options, caplog, given, message):
    with caplog.at_level(logging.WARNING):
        validate(moe_options(moe_gate="top_p", moe_null_experts=1))
        assert not caplog.messages
        validate(moe_options(moe_gate="top_p", **given))
    assert [message in text for text in caplog.messages] == [True]
