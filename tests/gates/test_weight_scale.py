"""The scale of the combine weights."""

import logging

import pytest
import torch

from evomoe_plugin.config.checks import validate
from evomoe_plugin.gates import gate_class
from evomoe_plugin.gates.weight_scale import MEAN_DECAY
from evomoe_plugin.routing import stats as st
from tests.gates.test_every_gate import GATES, T, cases, label, tokens

CHANGED = [
    {"moe_gate": "base"},
    {"moe_gate": "dense_to_sparse", "moe_temperature_start": 0.6, "moe_gate_threshold": 0.05},
    {"moe_gate": "dense_to_sparse", "moe_hard_updates": 0},
    {"moe_gate": "expert_choice", "moe_allow_noncausal": True},
    {"moe_gate": "relu"},
    {"moe_gate": "stable", "moe_stable_updates": 50},
    {"moe_gate": "switch"},
    {"moe_gate": "top_k", "moe_top_k": 2},
    {"moe_gate": "top_k", "moe_top_k": 2, "moe_null_experts": 2},
]


def twins(make_layer, given, scale):
    """Gates of two layers that differ only in the scale."""
    gates = []
    for kind in ("none", scale):
        torch.manual_seed(4)
        gates.append(make_layer(**given, moe_weight_scale=kind).gate)
    return gates


def routed(gate, x, known):
    """Weights [T, C] of selected candidates, unscaled and scaled, with the context's noise."""
    from evomoe_plugin.gates import GateContext

    context = GateContext(token_keys_T=known["token_keys_T"], token_ids_T=known["token_ids_T"])
    choice = gate.route(x, context)
    scaled_TC = choice.weights_TC
    if gate.weight_scale is not None:
        scaled_TC = gate.weight_scale(scaled_TC, choice.mask_TC)
    plan = gate(x, context)
    E = gate.num_experts
    assert torch.equal(plan.weights_N, scaled_TC[:, :E].T[choice.mask_TC[:, :E].T])
    return choice, scaled_TC


@pytest.mark.parametrize("given", CHANGED, ids=label)
def test_unit_has_weights_of_sum_1_and_the_gradient_of_the_unscaled(make_layer, given):
    plain, unit = twins(make_layer, given, "unit")
    x, known = tokens()
    choice, scaled_TC = routed(unit, x, known)
    base, _ = routed(plain, x, known)
    mask_TC, w_TC = base.mask_TC, base.weights_TC
    assert torch.equal(mask_TC, choice.mask_TC)
    seed_TC = torch.randn_like(w_TC) * mask_TC
    total = torch.ones(T, dtype=torch.float64)
    for t in range(T):
        if mask_TC[t].any():
            total[t] = sum(float(w_TC[t, c]) for c in mask_TC[t].nonzero())
            assert float(scaled_TC[t][mask_TC[t]].sum()) == pytest.approx(1, abs=1e-12)
    assert not torch.allclose(total, torch.ones_like(total), atol=1e-2)
    got = torch.autograd.grad(scaled_TC, [x, *unit.parameters()], seed_TC, allow_unused=True)
    seed_TC = seed_TC / total.unsqueeze(1)
    wanted = torch.autograd.grad(w_TC, [x, *plain.parameters()], seed_TC, allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-12)
    assert got[0].abs().sum() > 0  # a single pick of weight 1 still teaches the gate


@pytest.mark.parametrize("gate", ["switch", "base"])
def test_the_gradient_of_a_single_pick(make_layer, gate):
    """Of weight 1: 1[j = e] - p_j with a softmax, 1 - σ with a sigmoid."""
    made = twins(make_layer, {"moe_gate": gate}, "unit")[1].eval()
    x, known = tokens()
    choice, scaled_TC = routed(made, x, known)
    assert torch.allclose(scaled_TC[choice.mask_TC], torch.ones(T, dtype=torch.float64))
    grad_TC = torch.autograd.grad(scaled_TC[choice.mask_TC].sum(), choice.logits_TC)[0]
    z_TC, picked = choice.logits_TC.detach(), choice.mask_TC.double()
    wanted = picked - z_TC.softmax(1) if gate == "switch" else picked * (1 - z_TC.sigmoid())
    assert torch.allclose(grad_TC, wanted, atol=1e-12)


@pytest.mark.parametrize("given", [*CHANGED, {"moe_gate": "hash"}], ids=label)
def test_learned_gains_and_their_gradients(make_layer, given):
    plain, learned = twins(make_layer, given, "learned")
    gain_C = learned.weight_scale.gain
    assert (gain_C == 1).all()
    gain_C.data.copy_(torch.rand(len(gain_C)) + 0.5)
    x, known = tokens()
    choice, scaled_TC = routed(learned, x, known)
    mask_TC, w_TC = choice.mask_TC, choice.weights_TC.detach()
    assert torch.allclose(scaled_TC, w_TC * gain_C)
    seed_TC = torch.randn_like(w_TC) * mask_TC
    grad_C = torch.autograd.grad(scaled_TC, gain_C, seed_TC)[0]
    for c in range(len(gain_C)):
        wanted = sum(seed_TC[t, c] * w_TC[t, c] for t in range(T))
        assert float(grad_C[c]) == pytest.approx(float(wanted), abs=1e-12)


@pytest.mark.parametrize("given", CHANGED, ids=label)
def test_the_running_mean_of_the_weights(make_layer, given):
    """Over tokens with a candidate, before scaling; the first one is taken as it is."""
    layer = make_layer(**given, moe_weight_scale="mean")
    gate, scale = layer.gate, layer.gate.weight_scale
    assert gate.changes_after_updates
    assert scale.mean == 1
    wanted = None
    for n in range(1, 4):
        x, known = tokens()
        mask = torch.rand(T) < 0.7
        layer.set_num_updates(n - 1)
        context = layer.context(mask, **known)
        choice = gate.route(x, context)
        plan = gate(x, context)
        sums = [
            float(choice.weights_TC[t][choice.mask_TC[t]].sum())
            for t in range(T)
            if mask[t] and choice.mask_TC[t].any()
        ]
        mean = sum(sums) / len(sums)
        divisor = 1 if wanted is None else wanted
        weights_N = choice.weights_TC[plan.token_ids_N, plan.expert_ids_N] / divisor
        assert torch.allclose(plan.weights_N, weights_N, atol=1e-12)
        wanted = mean if wanted is None else MEAN_DECAY * wanted + (1 - MEAN_DECAY) * mean
        scale.update(*plan.stats[st.WEIGHTS_2])
        assert float(scale.mean) == pytest.approx(wanted, abs=1e-12)
    scale.update(*gate.zero_stats(x.device)[st.WEIGHTS_2])  # an update without tokens
    assert float(scale.mean) == pytest.approx(wanted, abs=1e-12)


def test_no_jump_at_the_hard_switch(make_layer):
    """With `unit` the weights of a token sum to 1 from the first update to the last."""
    given = {
        "moe_gate": "dense_to_sparse",
        "moe_temperature_start": 3.0,
        "moe_temperature_updates": 20,
        "moe_gate_threshold": 0.1,
    }
    x, known = tokens()
    totals = {}
    for scale in ("none", "unit"):
        layer = make_layer(**given, moe_weight_scale=scale)
        for n in (0, 10, 19, 20, 30):
            layer.set_num_updates(n)
            plan = layer.gate(x, layer.context(**known))
            assert (plan.num_pairs == T) == (n >= 20)
            total_T = torch.zeros(T, dtype=torch.float64)
            totals[scale, n] = total_T.index_add(0, plan.token_ids_N, plan.weights_N.detach())
    for n in (0, 10, 19, 20, 30):
        assert torch.allclose(totals["unit", n], torch.ones(T, dtype=torch.float64))
    assert (totals["none", 19] - totals["none", 20]).abs().max() > 0.1


@pytest.mark.parametrize("given", list(cases(also_of_the_layer=True)), ids=label)
def test_weights_that_are_said_to_sum_to_1_do(make_layer, moe_options, given):
    given = {name: value for name, value in given.items() if name != "moe_weight_scale"}
    if not gate_class(given["moe_gate"]).weights_sum_to_one(moe_options(**given)):
        return
    layer = make_layer(**given)
    x, known = tokens()
    choice = layer.gate.route(x, layer.context(**known))
    total_T = (choice.weights_TC * choice.mask_TC).sum(1)[choice.mask_TC.any(1)]
    assert torch.allclose(total_T, torch.ones_like(total_T))


def test_what_is_warned_of(moe_options, caplog):
    warned = {}
    for gate in GATES:
        given = {"moe_allow_noncausal": True} if gate == "expert_choice" else {}
        for scale in ("none", "unit", "mean", "learned"):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                validate(moe_options(moe_gate=gate, moe_weight_scale=scale, **given))
            warned[gate, scale] = [m for m in caplog.messages if "--moe-weight-scale" in m]
    without_effect = {(gate, scale) for (gate, scale), found in warned.items() if found}
    gates = ("dense", "dselect_k", "gshard", "hash", "top_any", "top_p")
    assert without_effect == {
        ("stable", "unit"),
        *((gate, scale) for gate in gates for scale in ("unit", "mean")),
    }
    assert "with the gate hash and these options; this changes nothing" in warned["hash", "unit"][0]
    assert "the weight of the gate stable is always 1" in warned["stable", "unit"][0]
    caplog.clear()
    options = {"moe_top_k": 1, "moe_top_k_weights": "renormalized", "moe_weight_scale": "unit"}
    with caplog.at_level(logging.WARNING):
        validate(moe_options(moe_gate="top_k", **options))
    assert [("nothing" in m, "auxiliary losses only" in m) for m in caplog.messages] == [
        (True, False),
        (False, True),
    ]
