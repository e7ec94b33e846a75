import pytest
import torch

from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.dense_to_sparse import DenseToSparseGate
from evomoe_plugin.gates.dense_to_sparse_options import annealing_updates, hard_updates
from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.noise import gumbel, sequence_keys

T, D, E = 40, 8, 6


@pytest.fixture
def make_gate(moe_options):
    def make(**given):
        return DenseToSparseGate(LayerInfo(D, E), moe_options(**given))

    return make


def dense_weights(plan, tokens=T):
    weights_TE = torch.zeros(tokens, E, dtype=plan.weights_N.dtype)
    weights_TE[plan.token_ids_N, plan.expert_ids_N] = plan.weights_N.detach()
    return weights_TE


def context(num_updates=0, noise=True, **given):
    keys = sequence_keys(torch.arange(T).unsqueeze(0))[0] if noise else None
    return GateContext(num_updates, token_keys_T=keys, **given)


def test_the_formula(make_gate):
    gate = make_gate(moe_temperature_start=1.5, moe_gate_threshold=0.2)
    x = torch.randn(T, D)
    ctx = context()
    plan = gate(x, ctx)
    gates = torch.softmax((x @ gate.scorer.weight.T + gumbel(ctx.noise_keys_T, E)) / 1.5, 1)
    chosen = gates > 0.2
    chosen[torch.arange(T), gates.argmax(1)] = True
    assert torch.allclose(dense_weights(plan), gates * chosen, atol=1e-6)
    balance = E * (gates * chosen).mean(0) @ chosen.float().mean(0)
    assert plan.aux["balance"].item() == pytest.approx(balance.item(), rel=1e-5)


def test_softmax_weights_know_no_noise_and_no_temperature(make_gate):
    gate = make_gate(moe_combine_weights="softmax", moe_temperature_start=50.0)
    x = torch.randn(T, D)
    assert torch.allclose(
        dense_weights(gate(x, context())), (x @ gate.scorer.weight.T).softmax(1), atol=1e-6
    )


def test_from_all_experts_to_one(make_gate):
    gate = make_gate(moe_temperature_start=2.0, moe_temperature_end=0.1, moe_temperature_updates=50)
    x = torch.randn(T, D)
    pairs = [gate(x, context(n)).num_pairs / T for n in (0, 20, 40, 49, 50, 90)]
    assert pairs[0] > 0.95 * E
    assert pairs == sorted(pairs, reverse=True)
    assert pairs[3] > 1
    assert pairs[4:] == [1, 1]


def test_hard_routing_is_noiseless_top1(make_gate):
    gate = make_gate(moe_hard_updates=10)
    x = torch.randn(T, D)
    plan = gate(x, context(10))
    assert torch.equal(
        plan.expert_ids_N[plan.token_ids_N.argsort()], (x @ gate.scorer.weight.T).argmax(1)
    )


def test_never_hard(make_gate):
    gate = make_gate(moe_hard_updates=-1, moe_temperature_end=1.0)
    assert gate(torch.randn(T, D), context(10**6)).num_pairs > T


def test_constant_temperature_without_threshold_is_the_dense_mixture(make_gate):
    gate = make_gate(moe_temperature_schedule="constant", moe_gate_threshold=0.0)
    plan = gate(torch.randn(T, D), context(10**6))
    assert plan.num_pairs == T * E
    assert torch.allclose(dense_weights(plan).sum(1), torch.ones(T))


@pytest.mark.parametrize("threshold", [0.5, 0.99])
def test_every_token_keeps_its_best_expert(make_gate, threshold):
    gate = make_gate(moe_gate_threshold=threshold)
    plan = gate(torch.randn(T, D), context())
    assert set(plan.token_ids_N.tolist()) == set(range(T))


@pytest.mark.parametrize("num_updates", [0, 15, 29, 30, 80])
def test_evaluation_is_noiseless_and_follows_training(make_gate, num_updates):
    gate = make_gate(moe_gate_threshold=0.1)
    x = torch.randn(T, D)
    evaluated = gate.eval()(x, context(num_updates))
    quiet = make_gate(moe_gate_threshold=0.1, moe_gate_noise="none")
    quiet.load_state_dict(gate.state_dict())
    trained = quiet.train()(x, context(num_updates))
    assert torch.equal(dense_weights(evaluated), dense_weights(trained))


@pytest.mark.parametrize("eval_gate, pairs", [("top1", T), ("dense", T * E)])
@pytest.mark.parametrize("num_updates", [0, 80])
def test_evaluation_on_request(make_gate, eval_gate, pairs, num_updates):
    gate = make_gate(moe_eval_gate=eval_gate).eval()
    assert gate(torch.randn(T, D), context(num_updates)).num_pairs == pairs


@pytest.mark.parametrize("weights", ["gate", "softmax"])
@pytest.mark.parametrize("num_updates", [0, 99])
def test_gradcheck_of_weights_and_loss(make_gate, weights, num_updates):
    gate = make_gate(moe_combine_weights=weights, moe_gate_threshold=0.05).double()
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)

    def outputs(x, weight):
        parameters = {"scorer.weight": weight}
        plan = torch.func.functional_call(gate, parameters, (x, context(num_updates)))
        return plan.weights_N, plan.aux["balance"]

    assert torch.autograd.gradcheck(outputs, (x, gate.scorer.weight), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gate_computes_in_fp32_whatever_the_model(make_gate, dtype):
    gate = make_gate().to(dtype)
    x = torch.randn(T, D).to(dtype)
    plan = gate(x, context())
    assert plan.weights_N.dtype == torch.float32
    exact = make_gate()
    exact.load_state_dict({"scorer.weight": gate.scorer.weight.float()})
    assert torch.equal(dense_weights(plan), dense_weights(exact(x.float(), context())))
    low = make_gate(moe_gating_use_fp32="false").to(dtype)
    assert low(x, context()).weights_N.dtype == dtype


def test_statistics(make_gate):
    gate = make_gate(moe_temperature_start=2.0, moe_temperature_end=1.0)
    mask = torch.rand(T) < 0.5
    plan = gate(torch.randn(T, D), context(15, token_mask_T=mask))
    assert plan.stats[st.TOKENS] == mask.sum()
    assert plan.stats[st.PAIRS] == plan.num_pairs
    assert torch.equal(plan.stats[st.LOAD_E], plan.tokens_per_expert_E.double())
    assert plan.stats[st.TEMPERATURE] / mask.sum() == pytest.approx(1.5)
    assert not any(value.requires_grad for value in plan.stats.values())


# Temperatures relative to a token's logits


def test_the_scope_token(make_gate):
    """z / sg(std z): the formula, its gradients, and indifference to the scale of the logits."""
    gate = make_gate(moe_temperature_scope="token", moe_temperature_start=1.5).double()
    x = torch.randn(T, D, dtype=torch.float64)
    with torch.no_grad():
        gate.scorer.weight[:, 0] *= 20
        x[0] = 0  # equal logits: as they are
    ctx = context(noise=False)
    choice = gate.route(x, ctx)
    logits = x @ gate.scorer.weight.T
    deviation = torch.ones(T, 1, dtype=torch.float64)
    for t in range(1, T):
        mean = sum(float(z) for z in logits[t]) / E
        deviation[t] = (sum((float(z) - mean) ** 2 for z in logits[t]) / E) ** 0.5
    wanted = (logits / deviation / 1.5).softmax(1)
    assert torch.allclose(choice.weights_TC, wanted, atol=1e-12)
    seed = torch.randn_like(wanted)
    grads = [
        torch.autograd.grad(w, gate.scorer.weight, seed)[0] for w in (choice.weights_TC, wanted)
    ]
    assert torch.allclose(*grads, atol=1e-12)
    gate.scorer.weight.data.mul_(100)
    assert torch.allclose(gate.route(x, ctx).weights_TC, wanted, atol=1e-9)


# Balance by a bias


def test_the_bias_selects_and_does_not_weigh(make_gate):
    given = {"moe_temperature_start": 0.7, "moe_gate_threshold": 0.2}
    gate = make_gate(moe_bias_update_rate=0.1, **given)
    gate.bias_C.copy_(torch.randn(E))
    x = torch.randn(T, D)
    for num_updates in (0, 80):
        ctx = context(num_updates)
        choice = gate.route(x, ctx)
        noisy = x @ gate.scorer.weight.T
        if num_updates == 0:
            noisy = noisy + gumbel(ctx.noise_keys_T, E)
        tau = gate.temperature(num_updates)
        selecting = ((noisy + gate.bias_C) / tau).softmax(1)
        mask = selecting > 0.2 if num_updates == 0 else torch.zeros(T, E, dtype=torch.bool)
        mask[torch.arange(T), selecting.argmax(1)] = True
        assert torch.equal(choice.mask_TC, mask)
        assert torch.allclose(choice.weights_TC, (noisy / tau).softmax(1), atol=1e-6)
        assert not torch.equal(mask, make_gate(**given).route(x, ctx).mask_TC)
        padding = torch.rand(T) < 0.5
        stats = gate(x, context(num_updates, token_mask_T=padding)).stats
        assert (
            stats[st.BEST_C].tolist() == selecting.argmax(1)[padding].bincount(minlength=E).tolist()
        )


def test_the_bias_moves_by_its_rate_towards_an_even_load(make_gate):
    gate = make_gate(moe_bias_update_rate=0.25)
    load = torch.tensor([60, 0, 10, 10, 9, -29], dtype=torch.float64)  # their mean is 10
    gate.after_update(1, {st.BEST_C: load}, {})
    assert gate.bias_C.tolist() == [-0.25, 0.25, 0, 0, 0.25, 0.25]
    assert make_gate().learns_after_updates is False


def test_the_bias_keeps_annealing_from_collapsing(make_layer):
    """A layer in training whose gate prefers one expert, from soft to hard routing."""

    def trained(rate):
        torch.manual_seed(5)
        layer = make_layer(
            moe_bias_update_rate=rate, moe_temperature_updates=100, moe_gate_noise="none"
        )
        x = torch.randn(300, 6, dtype=torch.float64)
        x[:, 0] = 1
        target = torch.randn(300, 6, dtype=torch.float64)
        layer.gate.scorer.weight.data[2, 0] += 6
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.005)
        for n in range(150):
            layer.set_num_updates(n)
            y, _, stats = layer(x)
            optimizer.zero_grad()
            (y - target).square().mean().backward()
            optimizer.step()
            if rate:
                layer.gate.after_update(n + 1, stats, {})
        load = layer(x)[2][st.LOAD_E]
        assert load.sum() == 300  # hard by now
        return float(load.max() / load.mean())

    assert trained(0.0) > 3
    assert trained(0.05) < 1.3


def test_the_length_of_the_annealing(moe_options):
    """A share of the updates with a gate, or a number of updates; hard routing follows."""
    for given, wanted in [
        ({}, 30),
        ({"moe_temperature_share": 0.5}, 50),
        ({"moe_temperature_share": 0.5, "moe_spawn_updates": 20}, 40),
        ({"moe_temperature_updates": 7}, 7),
    ]:
        options = moe_options(**given)
        assert annealing_updates(options) == hard_updates(options) == wanted
