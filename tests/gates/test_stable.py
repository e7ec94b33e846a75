import copy

import pytest
import torch
import torch.utils.checkpoint

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.experts import ExpertFFN
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.gradients import attach_zero_grads
from evomoe_plugin.gates.stable import StableGate, greedy_balance_loss, stable_updates
from evomoe_plugin.layer import MoELayer

T, D, E, V, SWITCH = 40, 8, 4, 30, 10


@pytest.fixture
def make_gate(moe_options):
    def make(experts=E, vocabulary=V, **given):
        info = LayerInfo(D, experts, token_counts_V=(1,) * vocabulary)
        options = moe_options(moe_gate="stable", **{"moe_stable_updates": SWITCH, **given})
        gate = StableGate(info, options)
        with torch.no_grad():
            gate.scorer.weight.mul_(10)
        return gate

    return make


def context(num_updates=0, tokens=T, **given):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, V, (tokens,), generator=generator)
    return GateContext(num_updates, token_ids_T=ids, **given)


def experts(plan):
    return plan.expert_ids_N[plan.token_ids_N.argsort()]


def weights(plan):
    return plan.weights_N[plan.token_ids_N.argsort()]


@pytest.mark.parametrize("padding", [False, True])
def test_stage_1_by_hand(make_gate, padding):
    gate, x = make_gate(), torch.randn(T, D)
    mask = torch.rand(T) < 0.7 if padding else torch.ones(T, dtype=torch.bool)
    ctx = context(SWITCH - 1, token_mask_T=mask if padding else None)
    plan = gate(x, ctx)
    real = mask.nonzero().squeeze(1).tolist()
    loads, sums, surprise = [0] * E, [0.0] * E, 0.0
    chosen = []
    for t in real:
        scores = [float(x[t] @ gate.scorer.weight[e]) for e in range(E)]
        e = scores.index(max(scores))
        chosen.append((e, 1 / (1 + torch.tensor(-scores[e]).exp())))
        loads[e] += 1
        sums[e] += float(chosen[-1][1])
        words = gate.word_embedding[ctx.token_ids_T[t]] @ gate.word_centroids.T
        surprise -= float(words.log_softmax(0)[e])
    assert experts(plan).tolist() == [e for e, _ in chosen]
    assert torch.allclose(weights(plan), torch.tensor([w for _, w in chosen]))
    mean = len(real) / E
    balance = sum((n - mean) / mean * s for n, s in zip(loads, sums, strict=True)) / len(real)
    assert plan.aux["greedy_balance"].item() == pytest.approx(balance, rel=1e-4)
    assert plan.aux["distill"].item() == pytest.approx(surprise / len(real), rel=1e-4)


def test_an_even_load_costs_nothing():
    mask = torch.eye(4).bool().repeat(3, 1)
    loss = greedy_balance_loss(scores_TE=torch.rand(12, 4), mask_TE=mask)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_the_balance_loss_lowers_scores_of_busy_experts_and_raises_others():
    mask = torch.tensor([[1, 0], [1, 0], [1, 0], [0, 1]]).bool()
    scores = torch.rand(4, 2, requires_grad=True)
    greedy_balance_loss(scores_TE=scores, mask_TE=mask).backward()
    assert (scores.grad[:3, 0] > 0).all()
    assert scores.grad[3, 1] < 0
    assert not scores.grad[~mask].any()


def test_distillation_teaches_the_word_router_alone(make_gate):
    gate = make_gate()
    x = torch.randn(T, D, requires_grad=True)
    gate(x, context()).aux["distill"].backward()
    assert x.grad is None
    assert gate.scorer.weight.grad is None
    assert gate.word_embedding.grad.any()
    assert gate.word_centroids.grad.any()


@pytest.mark.parametrize("num_updates", [0, SWITCH])
def test_gradcheck(make_gate, num_updates):
    gate = make_gate().double()
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    names = ["scorer.weight", "word_embedding", "word_centroids"]

    def outputs(x, *parameters):
        values = dict(zip(names, parameters, strict=True))
        plan = torch.func.functional_call(gate, values, (x, context(num_updates)))
        losses = tuple(plan.aux.values()) if num_updates < SWITCH else ()
        return plan.weights_N, *losses

    inputs = [x, *(gate.get_parameter(name) for name in names)]
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)


def test_stage_2_routes_by_the_word_router_as_it_was(make_gate):
    gate, x = make_gate(), torch.randn(T, D)
    wanted_V = (gate.word_embedding @ gate.word_centroids.T).argmax(1)
    ctx = context(SWITCH)
    plan = gate(x, ctx)
    assert torch.equal(experts(plan), wanted_V[ctx.token_ids_T])
    scores = (x @ gate.scorer.weight.T).sigmoid()
    assert torch.allclose(weights(plan), scores[torch.arange(T), experts(plan)])
    assert torch.equal(gate.table_V, wanted_V)
    assert plan.aux["greedy_balance"] == plan.aux["distill"] == 0
    assert not any(loss.requires_grad for loss in plan.aux.values())
    # Weight decay, momentum, whatever: the routing stays.
    with torch.no_grad():
        gate.word_embedding.normal_()
        gate.word_centroids.normal_()
        gate.scorer.weight.normal_()
    for training in (True, False):
        again = gate.train(training)(torch.randn(T, D), context(SWITCH + 7))
        assert torch.equal(experts(again), experts(plan))


def test_the_optimizer_cannot_move_the_routing(make_gate):
    gate, x = make_gate(), torch.randn(T, D)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.3, weight_decay=0.5)
    routes = []
    for num_updates in range(SWITCH + 10):
        plan = gate(x, context(num_updates))
        loss = plan.weights_N.square().sum() + sum(plan.aux.values())
        loss = attach_zero_grads(loss, gate)  # as the layer does
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if num_updates >= SWITCH:
            assert not gate.word_embedding.grad.any()
            routes.append(experts(plan))
        optimizer.step()
    moved_V = (gate.word_embedding @ gate.word_centroids.T).argmax(1)
    assert not torch.equal(moved_V, gate.table_V)  # momentum and decay did go on
    assert all(torch.equal(route, routes[0]) for route in routes)


def test_distillation_is_learned_and_kept(make_gate):
    """Token ids that the gate always sends to one expert go there in stage 2 as well."""
    gate = make_gate()
    words = torch.randn(V, D)
    optimizer = torch.optim.Adam([gate.word_embedding, gate.word_centroids], lr=0.1)
    for _ in range(60):
        ids = torch.randint(0, V, (200,))
        optimizer.zero_grad()
        gate(words[ids], GateContext(0, token_ids_T=ids)).aux["distill"].backward()
        optimizer.step()
    ids = torch.arange(V)
    learned = experts(gate(words, GateContext(SWITCH - 1, token_ids_T=ids)))
    frozen = experts(gate(words, GateContext(SWITCH, token_ids_T=ids)))
    assert torch.equal(learned, frozen)


def test_a_checkpoint_of_exactly_the_switch_evaluates_as_training_goes_on(make_gate):
    trained, evaluated = make_gate(), make_gate()
    evaluated.load_state_dict(trained.state_dict())
    x = torch.randn(T, D)
    assert trained.frozen_at == -1
    wanted = trained(x, context(SWITCH))
    got = evaluated.eval()(x, context(SWITCH))
    assert torch.equal(experts(got), experts(wanted))
    assert trained.frozen_at == SWITCH
    later = make_gate()
    later.load_state_dict(trained.state_dict())
    assert torch.equal(experts(later.eval()(x, context(SWITCH + 50))), experts(wanted))


def test_evaluation_before_the_switch_sets_nothing(make_gate):
    gate = make_gate().eval()
    gate(torch.randn(T, D), context(SWITCH - 1))
    assert gate.frozen_at == -1


def test_activation_checkpointing_at_the_switch(make_gate):
    layer = MoELayer(make_gate(), ExpertFFN(E, D, 6, torch.tanh))
    layer.set_num_updates(SWITCH)
    plain = copy.deepcopy(layer)
    x = torch.randn(T, D)
    results = []
    for module, checkpointed in ((layer, True), (plain, False)):
        rows = x.clone().requires_grad_()

        def run(rows, module=module):
            return module(rows, None, None, context().token_ids_T)

        if checkpointed:
            y, aux, stats = torch.utils.checkpoint.checkpoint(run, rows, use_reentrant=True)
        else:
            y, aux, stats = run(rows)
        (y.square().sum() + aux.sum()).backward()
        results.append([y, stats, rows.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_updates", [0, SWITCH])
def test_half_precision_models_have_an_fp32_gate(make_gate, dtype, num_updates):
    gate = make_gate().to(dtype)
    x = torch.randn(T, D).to(dtype)
    plan = gate(x, context(num_updates))
    assert plan.weights_N.dtype == torch.float32
    assert gate.table_V.dtype == torch.int64
    exact = make_gate()
    exact.load_state_dict(gate.state_dict())
    assert torch.equal(experts(plan), experts(exact(x.float(), context(num_updates))))


@pytest.mark.parametrize("num_updates", [0, SWITCH])
@pytest.mark.parametrize("scale", [0.0, 1e30])
@pytest.mark.parametrize("tokens", [0, 1, T])
def test_odd_batches(make_gate, num_updates, scale, tokens):
    gate = make_gate()
    x = torch.full((tokens, D), scale, requires_grad=True)
    plan = gate(x, context(num_updates, tokens=tokens))
    assert plan.num_pairs == tokens
    (plan.weights_N.sum() + sum(plan.aux.values())).backward()
    grads = [p.grad for p in gate.parameters() if p.grad is not None]
    assert grads
    for value in (*plan.aux.values(), *grads):
        assert value.isfinite().all()


def test_one_expert(make_gate):
    gate = make_gate(experts=1)
    for num_updates in (0, SWITCH):
        plan = gate(torch.randn(T, D), context(num_updates))
        assert plan.tokens_per_expert_E.tolist() == [T]
        assert [loss.item() for loss in plan.aux.values()] == [0, 0]


def test_the_switch_is_a_tenth_of_the_run_by_default(moe_options):
    assert stable_updates(moe_options(max_update=60_000)) == 6_000
    assert stable_updates(moe_options(max_update=3)) == 1
    assert stable_updates(moe_options(moe_stable_updates=77)) == 77


def test_its_numbers(make_gate):
    gate = make_gate()
    assert gate.word_embedding.shape == (V, 50)
    assert gate.flops_per_token() == 2 * E * D + 2 * E * 50
    assert make_gate(moe_stable_dim=7).word_centroids.shape == (E, 7)


def test_what_is_missing_is_named(make_gate):
    with pytest.raises(OptionError, match="--moe-gate stable: .*no vocabulary is known"):
        make_gate(vocabulary=0)
    with pytest.raises(ValueError, match="stable routes by token ids: give token_ids_T"):
        make_gate()(torch.randn(3, D), GateContext())


@pytest.mark.parametrize(
    "given, message",
    [
        ({"moe_stable_updates": -1}, "--moe-stable-updates -1: give 0 or more"),
        ({"max_update": 0}, "--moe-stable-updates (not given): give it, or --max-update"),
        ({"moe_stable_dim": 0}, "--moe-stable-dim 0: give a width of at least 1"),
        ({"moe_null_experts": 1}, "--moe-null-experts 1: the gate stable cannot select"),
        ({"moe_scorer": "mlp"}, "--moe-scorer mlp: the gate stable does not use it"),
        ({"moe_aux": "l1=1"}, "no loss named 'l1' for the gate stable"),
    ],
)
def test_bad_values(moe_options, given, message):
    with pytest.raises(OptionError) as error:
        validate(moe_options(moe_gate="stable", **given))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "given, warning",
    [
        ({"moe_aux": "greedy_balance=0.3"}, "that of an untrained router"),
        ({"moe_aux": "distill=0"}, "that of an untrained router"),
        ({"moe_stable_updates": 0}, "that of an untrained router"),
        ({"moe_stable_updates": 100}, "the run ends before routing is frozen at update 100"),
    ],
)
def test_doubtful_values_are_warned_of(moe_options, caplog, given, warning):
    validate(moe_options(moe_gate="stable", **given))
    assert warning in caplog.text


def test_defaults_pass_without_a_word(moe_options, caplog):
    validate(moe_options(moe_gate="stable"))
    assert not caplog.text


def test_a_later_end_of_stage_1_does_not_unfreeze(make_gate):
    """The default is a share of --max-update, which a prolonged run changes."""
    gate, x = make_gate(), torch.randn(T, D)
    gate(x, context(SWITCH))
    prolonged = make_gate(moe_stable_updates=2 * SWITCH)
    prolonged.load_state_dict(gate.state_dict())
    with torch.no_grad():
        prolonged.scorer.weight.neg_()
    for mode in (True, False):
        plan = prolonged.train(mode)(x, context(SWITCH + 1))
        assert torch.equal(experts(plan), experts(gate(x, context(SWITCH + 1))))


def test_training_from_update_0_again_begins_with_stage_1(make_gate):
    gate, x = make_gate(), torch.randn(T, D)
    gate(x, context(SWITCH))
    gate(x, context(0))
    assert gate.frozen_at == -1
    with torch.no_grad():
        gate.word_centroids.neg_()
    old = gate.table_V.clone()
    gate(x, context(SWITCH))
    assert gate.frozen_at == SWITCH
    assert not torch.equal(gate.table_V, old)
