"""What scoring gates add to their logits, and what that does to training."""

import logging

import pytest
import torch
from torch import nn

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.gates import GateContext, LayerInfo, gate_class
from evomoe_plugin.gates.hash_tables import random_table
from evomoe_plugin.routing import stats as st

T, D, E, V = 30, 6, 5, 12


@pytest.fixture
def make_gate(moe_options):
    def make(gate="switch", num_null=0, layer_id=0, vocabulary=V, **given):
        options = moe_options(moe_gate=gate, moe_null_experts=num_null, **given)
        counts = (1,) * vocabulary
        info = LayerInfo(D, E, num_null, layer_id, seed=7, token_counts_V=counts)
        return gate_class(gate)(info, options).double()

    return make


def tokens(count=T):
    x = torch.randn(count, D, dtype=torch.float64) + 2  # with a mean worth subtracting
    return x.requires_grad_(), torch.randint(0, V, (count,))


def at(ids, num_updates=0, **given):
    return GateContext(num_updates, token_ids_T=ids, **given)


# The formula


@pytest.mark.parametrize("num_updates", [0, 3, 9, 39, 70])
@pytest.mark.parametrize("gate, scorer", [("switch", "linear"), ("top_k", "sigmoid")])
def test_the_logits_and_their_gradients(make_gate, gate, scorer, num_updates):
    """z = s f(x - m) + d T[i], token by token, and what each parameter learns from it."""
    gate = make_gate(
        gate,
        moe_scorer=scorer,
        moe_lexical="normal:2",
        moe_lexical_lr_factor=5.0,
        moe_lexical_decay_updates=40,
        moe_gate_lr_factor=3.0,
        moe_gate_warmup_updates=10,
        moe_gate_centre=0.9,
    )
    gate.centred_input.mean_D.copy_(torch.randn(D))
    x, ids = tokens()
    logits = gate.score(x, at(ids, num_updates))
    seed = torch.randn_like(logits)
    parameters = [x, gate.scorer.weight, gate.lexical.table]
    grads = torch.autograd.grad(logits, parameters, seed)

    m = gate.centred_input.mean_D
    s, d = min(1, (num_updates + 1) / 10), max(0, 1 - num_updates / 40)
    weight, table = 3 * gate.scorer.weight.detach(), 5 * gate.lexical.table.detach()
    of_x, of_weight, of_table = (torch.zeros_like(value) for value in parameters)
    for t in range(T):
        i = int(ids[t])
        for e in range(E):
            z = s * sum(weight[e, j] * (x[t, j] - m[j]) for j in range(D)) + d * table[i, e]
            assert float(logits[t, e]) == pytest.approx(float(z), abs=1e-12)
            of_x[t] += seed[t, e] * s * weight[e]
            of_weight[e] += seed[t, e] * s * 3 * (x[t] - m).detach()
            of_table[i, e] += seed[t, e] * d * 5
    for got, wanted in zip(grads, (of_x, of_weight, of_table), strict=True):
        assert torch.allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize("gate", ["dense_to_sparse", "relu", "gshard"])
def test_gradcheck(make_gate, gate):
    """Of weights and losses in everything that has no straight-through gradient."""
    gate = make_gate(
        gate,
        moe_lexical="normal:1",
        moe_gate_centre=0.5,
        moe_weight_scale="learned",
        moe_aux="consistency=1,z=1",
        **({"moe_second_expert_policy": "all"} if gate == "gshard" else {}),
    )
    x, ids = tokens(10)
    gate.centred_input.mean_D.copy_(x.detach().mean(0))
    names = [name for name, _ in gate.named_parameters()]

    def outputs(x, *values):
        parameters = dict(zip(names, values, strict=True))
        plan = torch.func.functional_call(gate, parameters, (x, at(ids, 5)))
        return plan.weights_N, *plan.aux.values()

    assert names == ["scorer.weight", "lexical.table", "weight_scale.gain"]
    assert torch.autograd.gradcheck(outputs, (x, *gate.parameters()), fast_mode=True)


def test_how_a_table_starts(make_gate):
    assert not make_gate(moe_lexical="zero").lexical.logits(0).any()
    normal = make_gate(vocabulary=4000, moe_lexical="normal:3").lexical.logits(0)
    assert normal.shape == (4000, E)
    assert normal.std().item() == pytest.approx(3, rel=0.02)
    for layer_id in (0, 1):
        # The experts of --moe-gate hash --moe-hash random; no id starts at a null expert.
        hashed = make_gate(num_null=2, layer_id=layer_id, moe_lexical="hash: 2.5").lexical.logits(0)
        expert_V = random_table(V, E, layer_id, seed=7)
        assert torch.equal(hashed, 2.5 * nn.functional.one_hot(expert_V, E + 2).double())


def test_factors_do_not_change_where_training_starts(make_gate):
    def made(**given):
        torch.manual_seed(3)
        return make_gate(moe_lexical="normal:1", **given)

    plain, other = made(), made(moe_gate_lr_factor=4.0, moe_lexical_lr_factor=0.25)
    x, ids = tokens()
    torch.testing.assert_close(other.score(x, at(ids)), plain.score(x, at(ids)))
    torch.testing.assert_close(other.vectors(), plain.vectors())  # what `simplicity` measures
    scaled = made(moe_gate_init_scale=8.0)
    assert torch.equal(scaled.scorer.weight, 8 * plain.scorer.weight)
    assert torch.equal(scaled.lexical.table, plain.lexical.table)


def test_a_factor_is_a_learning_rate_under_adam(make_gate):
    """Trained beside a gate whose parameter groups have those learning rates."""
    x, ids = tokens()
    target = torch.randn(T, E, dtype=torch.float64)

    def trained(groups, **given):
        torch.manual_seed(3)
        gate = make_gate("top_k", moe_lexical="normal:1", moe_aux="none", **given)
        rates = {gate.scorer.weight: 0.1 * groups[0], gate.lexical.table: 0.1 * groups[1]}
        optimizer = torch.optim.Adam(
            [{"params": [p], "lr": rate} for p, rate in rates.items()], eps=0.0
        )
        for n in range(15):
            plan = gate(x.detach(), at(ids, n))
            loss = (plan.weights_N * target[plan.token_ids_N, plan.expert_ids_N]).sum()
            optimizer.zero_grad()
            loss.backward()
            gate.lexical.table.grad += 1e-9  # Adam without epsilon divides by it
            optimizer.step()
        return gate.score(x, at(ids, 0)).detach()

    by_factor = trained((1, 1), moe_gate_lr_factor=0.2, moe_lexical_lr_factor=3.0)
    assert torch.allclose(by_factor, trained((0.2, 3.0)), atol=1e-4)
    assert not torch.allclose(by_factor, trained((1, 1)), atol=0.1)


# Losses and what is not causal


def test_consistency_teaches_the_scorer_what_a_decayed_table_knew(make_gate):
    gate = make_gate(moe_lexical="hash:3", moe_lexical_decay_updates=10, moe_aux="consistency=1")
    x, ids = tokens(300)
    known = torch.cat([x.detach(), nn.functional.one_hot(ids, V).double()], 1)[:, -D:]
    before = gate(known, at(ids, 10)).aux["consistency"]
    optimizer = torch.optim.Adam([gate.scorer.weight], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        gate(known, at(ids, 10)).aux["consistency"].backward()
        optimizer.step()
    assert gate(known, at(ids, 10)).aux["consistency"] < 0.8 * before
    own_id = known.sum(1) == 1  # their ids can be read off the input
    assert own_id.sum() > 100
    chosen = gate.score(known, at(ids, 10)).argmax(1)
    assert torch.equal(chosen[own_id], gate.lexical.table.argmax(1)[ids][own_id])


@pytest.mark.parametrize("gate", ["switch", "top_k", "dense_to_sparse"])
def test_training_is_causal(make_gate, gate):
    """What is subtracted and divided by is of earlier updates: later tokens change nothing."""
    for scale in ("unit", "mean"):
        made = make_gate(gate, moe_lexical="normal:1", moe_gate_centre=0.9, moe_weight_scale=scale)
        x, ids = tokens()
        own = made(x, at(ids)).stats
        made.finish_update(1, own, {})
        assert made.centred_input.mean_D.any()
        y, other_ids = x.detach().clone(), ids.clone()
        y[20:] += 5
        other_ids[20:] = (ids[20:] + 1) % V
        one, other = made.route(x, at(ids)), made.route(y, at(other_ids))
        assert torch.equal(one.mask_TC[:20], other.mask_TC[:20])
        assert torch.equal(one.weights_TC[:20], other.weights_TC[:20])
        weights = [made.weight_scale(c.weights_TC, c.mask_TC)[:20] for c in (one, other)]
        assert torch.equal(*weights)
        assert not torch.equal(one.weights_TC[20:], other.weights_TC[20:])


# The running mean


def no_tokens(gate):
    """The statistics of an update without tokens."""
    zero = torch.zeros((), dtype=torch.float64)
    return {st.TOKENS: zero, **gate.zero_stats(zero.device)}


def test_the_running_mean(make_gate):
    gate = make_gate(moe_gate_centre=0.75)
    assert gate.changes_after_updates
    seen = []
    for n in range(1, 4):
        x, ids = tokens()
        mask = torch.rand(T) < 0.6
        x.data[~mask] = float("nan")  # padding may hold anything
        own = gate(x, at(ids, n - 1, token_mask_T=mask)).stats
        seen.append(x.detach()[mask].mean(0))
        gate.finish_update(n, own, {})
    wanted = 0.75 * (0.75 * seen[0] + 0.25 * seen[1]) + 0.25 * seen[2]
    assert torch.allclose(gate.centred_input.mean_D, wanted, atol=1e-12)
    gate.finish_update(4, no_tokens(gate), {})
    assert torch.allclose(gate.centred_input.mean_D, wanted, atol=1e-12)


def test_the_first_mean_is_taken_whenever_it_comes(make_gate):
    """LayerDrop may skip the layer in the first update."""
    gate = make_gate(moe_gate_centre=0.99)
    gate.finish_update(1, no_tokens(gate), {})
    x, ids = tokens()
    gate.finish_update(2, gate(x, at(ids)).stats, {})
    assert torch.allclose(gate.centred_input.mean_D, x.mean(0))


def test_no_precision_loses_the_mean(make_gate):
    gate = make_gate(moe_gate_centre=0.9)
    gate.centred_input.mean_D.fill_(4.001)
    assert (gate.half().centred_input.mean_D == 4.001).all()


# What needs what


def test_a_lookup_costs_no_flops(make_gate):
    assert (
        make_gate(moe_lexical="normal:1", moe_weight_scale="learned").flops_per_token()
        == make_gate().flops_per_token()
        == 2 * D * E
    )


def test_token_ids_and_a_vocabulary_are_needed(make_gate):
    gate = make_gate(moe_lexical="zero")
    x, _ = tokens()
    with pytest.raises(ValueError, match="routes by token ids: give token_ids_T"):
        gate(x, GateContext())
    with pytest.raises(ValueError, match=r"the gate must call self.score\(x_TD, context\)"):
        gate.score(x)
    with pytest.raises(OptionError, match="--moe-lexical zero: .*no vocabulary is known here"):
        make_gate(vocabulary=0, moe_lexical="zero")


LEXICAL = {"moe_lexical": "normal:3"}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"moe_lexical": "normal"}, "--moe-lexical normal: give none, zero, normal:STD or hash"),
        ({"moe_lexical": "normal:-1"}, "--moe-lexical normal:-1: give none, zero"),
        ({"moe_lexical": "hash:nan"}, "--moe-lexical hash:nan: give none, zero"),
        ({"moe_lexical": "zero:1"}, "--moe-lexical zero:1: give none, zero"),
        ({**LEXICAL, "moe_lexical_lr_factor": 0.0}, "--moe-lexical-lr-factor 0.0: give a factor"),
        ({"moe_gate_lr_factor": float("inf")}, "--moe-gate-lr-factor inf: give a factor above 0"),
        ({"moe_gate_init_scale": -1.0}, "--moe-gate-init-scale -1.0: give a factor above 0"),
        ({**LEXICAL, "moe_lexical_decay_updates": -1}, "--moe-lexical-decay-updates -1: give a n"),
        ({**LEXICAL, "moe_gate_warmup_updates": -1}, "--moe-gate-warmup-updates -1: give a numb"),
        ({"moe_gate_centre": 1.0}, "--moe-gate-centre 1.0: give a decay of at least 0 and below"),
        ({"moe_lexical_lr_factor": 2.0}, "--moe-lexical-lr-factor 2.0: there are no logits of to"),
        ({"moe_lexical_decay_updates": 5}, "--moe-lexical-decay-updates 5: there are no logits"),
        ({"moe_gate_warmup_updates": 5}, "--moe-gate-warmup-updates 5: there are no logits of to"),
        (
            {"moe_scorer": "gmm", "moe_gate_lr_factor": 2.0},
            "--moe-gate-lr-factor 2.0: the logits of the scorer gmm are not linear in its weights",
        ),
        (
            {"moe_scorer": "mlp", "moe_gate_init_scale": 2.0},
            "--moe-gate-init-scale 2.0: the logits of the scorer mlp are not linear",
        ),
        ({"moe_aux": "consistency"}, "--moe-aux consistency: consistency: there are no logits of"),
        (
            {"moe_gate": "hash", "moe_aux": "consistency"},
            "--moe-aux consistency: consistency: the gate hash has no logits",
        ),
        ({"moe_gate": "base", **LEXICAL}, "--moe-lexical normal:3: the gate base does not use it"),
    ],
)
def test_what_is_refused(moe_options, given, message):
    with pytest.raises(OptionError) as raised:
        validate(moe_options(**{"moe_gate": "switch", **given}))
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"moe_lexical_decay_updates": 91, "moe_spawn_updates": 10},
            "--max-update 100: the run ends before the decay of --moe-lexical does at update 101",
        ),
        (
            {"moe_gate_warmup_updates": 101},
            "--max-update 100: the run ends before the gate's warm-up does at update 101",
        ),
        (
            {"moe_lexical_decay_updates": 10, "moe_gate_warmup_updates": 20},
            "--moe-lexical-decay-updates 10: the table is gone before the scorer is at full",
        ),
    ],
)
def test_what_is_warned_of(moe_options, caplog, given, message):
    def validated(**given):
        validate(moe_options(moe_gate="switch", moe_lexical="zero", **given))

    with caplog.at_level(logging.WARNING):
        validated(moe_lexical_decay_updates=100, moe_gate_warmup_updates=100)
        assert not caplog.messages
        validated(**given)
    assert [message in text for text in caplog.messages] == [True]


def test_statistics_of_the_gates_input(make_gate):
    gate = make_gate(moe_gate_centre=0.5)
    x, ids = tokens()
    stats = gate(x, at(ids)).stats
    assert torch.allclose(stats[st.GATE_INPUT_D], x.detach().sum(0))
    assert st.GATE_INPUT_D not in make_gate()(x, at(ids)).stats
