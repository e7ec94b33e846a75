import pytest
import torch
from fairseq.logging import metrics

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.criterions.moe_cross_entropy import MoECrossEntropyCriterion
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.relu import COEFFICIENT_RANGE, ReluGate
from evomoe_plugin.routing import stats as st

T, D, E = 25, 8, 6


@pytest.fixture
def make_gate(moe_options):
    def make(experts=E, **given):
        return ReluGate(LayerInfo(D, experts), moe_options(moe_gate="relu", **given))

    return make


def dense(plan, experts=E, tokens=T):
    weights = torch.zeros(tokens, experts, dtype=plan.weights_N.dtype)
    weights[plan.token_ids_N, plan.expert_ids_N] = plan.weights_N.detach()
    return weights


def totals(pairs, tokens=1000.0, experts=E, **more):
    """Statistics of layers: pairs is a list."""
    size = len(pairs)
    return {
        st.PAIRS: torch.tensor(pairs).double(),
        st.TOKENS: torch.full((size,), tokens).double(),
        st.EXPERTS: torch.full((size,), tokens * experts).double(),
        **more,
    }


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_by_hand(make_gate, padding, training):
    gate = make_gate(moe_top_k=3, moe_l1_start=0.5).train(training)
    for update in range(2):
        gate.after_update(update, {}, totals([6000]))
    x = torch.randn(T, D)
    mask = torch.rand(T) < 0.7 if padding else None
    plan = gate(x, GateContext(token_mask_T=mask))
    real = mask.nonzero().squeeze(1).tolist() if padding else range(T)
    weights, counts = torch.zeros(T, E), [0] * E
    for t in real:
        for e in range(E):
            logit = float(x[t] @ gate.scorer.weight[e])
            if logit > 0:
                weights[t, e] = logit
                counts[e] += 1
    assert torch.allclose(dense(plan), weights)
    assert plan.num_pairs == sum(counts)
    n = len(real)
    norm = sum(E / (3 * n) * counts[e] * float(weights[t, e]) for t in real for e in range(E))
    assert plan.aux["l1"].item() == pytest.approx(0.5 * 1.2**2 * norm / n, rel=1e-4)
    assert plan.stats[st.COEFFICIENT].item() / n == pytest.approx(0.5 * 1.2**2)


def test_the_load_in_the_loss_has_no_gradient_of_its_own(make_gate):
    """Gradient of a weight: λ f_e / T, more for experts that many tokens use."""
    gate = make_gate(moe_top_k=2, moe_l1_start=1.0)
    weights = []
    score = gate.score
    gate.score = lambda x, context: weights.append(score(x)) or weights[-1]
    plan = gate(torch.randn(T, D), GateContext())
    grad = torch.autograd.grad(plan.aux["l1"], weights[0])[0]
    counts = (weights[0] > 0).sum(0)
    wanted = (weights[0] > 0) * (E / (2 * T) * counts) / T
    assert torch.allclose(grad, wanted)


@pytest.mark.parametrize("scorer", ["linear", "mlp", "gmm", "cosine"])
def test_gradcheck(make_gate, scorer):
    gate = make_gate(moe_scorer=scorer, moe_l1_start=1.0).double()
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in gate.named_parameters()]

    def outputs(x, *parameters):
        values = dict(zip(names, parameters, strict=True))
        plan = torch.func.functional_call(gate, values, (x, GateContext()))
        return plan.weights_N, plan.aux["l1"]

    assert torch.autograd.gradcheck(outputs, (x, *gate.parameters()), fast_mode=True)


def test_the_coefficient_follows_the_sparsity_of_all_layers(make_gate):
    gate = make_gate(moe_top_k=2)
    start = gate.coefficient.item()
    assert start == pytest.approx(1e-8)
    gate.after_update(1, {}, totals([3000, 2500]))  # too many: stronger
    assert gate.coefficient.item() == pytest.approx(1.2e-8)
    gate.after_update(2, {}, totals([5000, 1]))  # the layers together count, not one of them
    assert gate.coefficient.item() == pytest.approx(1.44e-8)
    gate.after_update(3, {}, totals([100, 200]))
    gate.after_update(4, {}, totals([100, 3899]))
    assert gate.coefficient.item() == pytest.approx(1e-8)
    gate.after_update(5, {}, totals([2000, 2000]))  # just right, or nothing seen: as it is
    gate.after_update(6, {}, totals([0, 0], tokens=0.0))
    assert gate.coefficient.item() == start


def test_the_target_is_a_sparsity_also_when_layers_differ_in_experts(make_gate):
    """target 1 - Σ k T / Σ E T against 1 - Σ pairs / Σ E T."""
    gate = make_gate(moe_top_k=2)
    layers = totals([3000, 1001])
    layers[st.EXPERTS] = torch.tensor([4000.0, 16_000.0]).double()
    sparsity = 1 - layers[st.PAIRS].sum() / layers[st.EXPERTS].sum()
    target = 1 - 2 * layers[st.TOKENS].sum() / layers[st.EXPERTS].sum()
    assert sparsity < target
    before = gate.coefficient.item()
    gate.after_update(1, {}, layers)
    assert gate.coefficient > before


def test_dropped_pairs_count_as_chosen(make_gate):
    gate = make_gate(moe_top_k=2)
    gate.after_update(1, {}, totals([1500], **{st.DROPPED: torch.tensor([600.0]).double()}))
    assert gate.coefficient.item() == pytest.approx(1.2e-8)


def test_the_coefficient_stays_finite_and_finds_back(make_gate):
    gate = make_gate(moe_top_k=2)
    for step in range(400):
        gate.after_update(step, {}, totals([6000]))
    most = 1e-8 * COEFFICIENT_RANGE
    assert gate.coefficient.item() == pytest.approx(most, rel=1e-12)
    assert gate(torch.randn(T, D), GateContext()).aux["l1"].isfinite()
    for step in range(400):
        gate.after_update(step, {}, totals([0]))
    least = 1e-8 / COEFFICIENT_RANGE
    assert gate.coefficient.item() == pytest.approx(least, rel=1e-12)


def test_the_control_comes_to_its_target(make_gate):
    """On a task whose best weights are all positive, that is, which wants all experts."""
    gate = make_gate(moe_top_k=1, moe_l1_start=1e-3)
    goal = torch.rand(E, D) / 4
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.01)
    pairs = []
    for step in range(400):
        x = torch.randn(200, D) + 1
        plan = gate(x, GateContext(step))
        weights = torch.zeros(200, E).index_put(
            (plan.token_ids_N, plan.expert_ids_N), plan.weights_N
        )
        loss = plan.aux["l1"] + (weights - (x @ goal.T).relu()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pairs.append(plan.num_pairs / 200)
        gate.after_update(step, {}, totals([plan.num_pairs], tokens=200.0))
    assert max(pairs[:60]) > 5
    assert sum(pairs[-100:]) / 100 == pytest.approx(1, abs=0.2)


def test_the_state_survives_half_precision_and_the_checkpoint(make_gate):
    gate = make_gate()
    for step in range(140):
        gate.after_update(step, {}, totals([6000]))
    other = make_gate().half()
    other.load_state_dict(gate.half().state_dict())
    assert other.coefficient.item() == pytest.approx(1e-8 * 1.2**140)


def test_an_older_checkpoint_keeps_the_strength_of_its_loss(make_gate):
    """It holds the coefficient of the loss divided by E."""
    gate = make_gate()
    older = gate.state_dict()
    del older["coefficient"]
    bits = torch.tensor(3e-3, dtype=torch.float64).view(torch.int64)
    gate.load_state_dict({**older, "coefficient_bits": bits})
    x = torch.randn(T, D)
    plan = gate(x, GateContext())
    weights = dense(plan)
    load = E / (2 * T) * (weights > 0).sum(0)
    assert plan.aux["l1"].item() == pytest.approx(3e-3 * float((load * weights).mean()))
    assert gate.coefficient.item() == pytest.approx(3e-3 / E)


def test_a_small_coefficient_is_logged_as_it_is(make_gate):
    gate = make_gate()
    gate.after_update(1, {}, totals([6000]))
    plan = gate(torch.randn(T, D), GateContext())
    stats = {f"moe_stats_{name}": value.unsqueeze(0) for name, value in plan.stats.items()}
    metrics.reset()
    with metrics.aggregate("train"):
        MoECrossEntropyCriterion.reduce_metrics(
            [
                {
                    "loss": 1.0,
                    "inner_loss": 1.0,
                    "sample_size": T,
                    "ntokens": T,
                    "moe_flops": 1.0,
                    **stats,
                }
            ]
        )
    logged = metrics.get_smoothed_values("train")
    assert logged["coefficient"] == pytest.approx(1.2e-8)


def test_without_its_loss_nothing_is_adapted(make_gate):
    assert make_gate().learns_after_updates
    assert make_gate(moe_aux="l1=0,z=0.1").learns_after_updates
    assert not make_gate(moe_aux="balance=0.1").learns_after_updates


@pytest.mark.parametrize("training", [False, True])
def test_a_token_without_a_positive_logit_goes_nowhere(make_gate, training):
    gate = make_gate().train(training)
    with torch.no_grad():
        gate.scorer.weight.abs_()
    x = torch.ones(4, D)
    x[1] = -1
    x[3] = 0
    plan = gate(x, GateContext())
    assert plan.token_ids_N.unique().tolist() == [0, 2]
    assert plan.tokens_per_expert_E.tolist() == [2] * E


def test_shares_for_losses_and_statistics(make_gate):
    gate = make_gate()
    with torch.no_grad():
        gate.scorer.weight.copy_(torch.eye(E, D))
    x = torch.zeros(4, D)
    x[0, :2] = torch.tensor([1.0, 3.0])
    x[2] = -1
    x[3, :2] = 3e38  # their sum is no fp32 number
    probs = gate.route(x, GateContext()).probs_TC
    assert probs[0].tolist() == [0.25, 0.75, 0, 0, 0, 0]
    assert torch.allclose(probs[1:3], torch.full((2, E), 1 / E))
    assert probs[3].tolist() == [0.5, 0.5, 0, 0, 0, 0]
    w = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    gate.double()
    assert torch.autograd.gradcheck(
        lambda w: gate.route(w, GateContext()).probs_TC, w, fast_mode=True
    )


def test_padding_and_token_weights(make_gate):
    gate = make_gate(moe_l1_start=1.0)
    x, mask, weight = torch.randn(T, D), torch.rand(T) < 0.6, torch.rand(T)
    alone = gate(x[mask], GateContext(token_weights_T=weight[mask]))
    x[~mask] = 1e30
    plan = gate(x, GateContext(token_mask_T=mask, token_weights_T=weight))
    assert torch.equal(dense(plan)[mask], dense(alone, tokens=int(mask.sum())))
    assert plan.aux["l1"].item() == pytest.approx(alone.aux["l1"].item(), rel=1e-5)
    assert plan.stats[st.COEFFICIENT].item() == pytest.approx(mask.sum().item())


@pytest.mark.parametrize("scorer", ["linear", "mlp", "gmm", "cosine"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e30, -1e30])
@pytest.mark.parametrize("tokens", [0, 1, T])
def test_odd_batches(make_gate, scorer, scale, tokens):
    gate = make_gate(moe_scorer=scorer, moe_aux="l1=1,balance=1,entropy=1")
    x = torch.full((tokens, D), scale, requires_grad=True)
    plan = gate(x, GateContext())
    (plan.weights_N.sum() * 1e-30 + sum(plan.aux.values())).backward()
    for value in (
        plan.weights_N,
        *plan.aux.values(),
        *plan.stats.values(),
        x.grad,
        *(p.grad for p in gate.parameters()),
    ):
        assert value.isfinite().all()


def test_one_expert(make_gate):
    gate = make_gate(experts=1, moe_top_k=1)
    x = torch.randn(T, D)
    plan = gate(x, GateContext())
    assert plan.num_pairs == (x @ gate.scorer.weight[0] > 0).sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_have_an_fp32_gate(make_gate, dtype):
    gate = make_gate().to(dtype)
    x = torch.randn(T, D).to(dtype)
    plan = gate(x, GateContext())
    assert plan.weights_N.dtype == torch.float32
    assert plan.aux["l1"].dtype == torch.float32
    assert plan.aux["l1"] > 0  # 1e-8 is 0 in fp16
    exact = make_gate()
    exact.load_state_dict(gate.state_dict())
    assert torch.equal(dense(plan), dense(exact(x.float(), GateContext())))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"moe_top_k": 0}, "--moe-top-k 0: give 1 or more"),
        ({"moe_top_k": 9, "moe_expert_count": "8"}, "--moe-top-k 9: an MoE layer has 8 candidates"),
        ({"moe_l1_start": 0.0}, "--moe-l1-start 0.0: give a number above 0"),
        ({"moe_l1_start": 2.0}, "--moe-l1-start 2.0"),
        ({"moe_l1_start": float("nan")}, "--moe-l1-start nan"),
        ({"moe_l1_factor": 1.0}, "--moe-l1-factor 1.0: give a factor above 1"),
        ({"moe_l1_factor": 100.0}, "--moe-l1-factor 100.0"),
        ({"moe_null_experts": 1}, "--moe-null-experts 1: the gate relu cannot select"),
        ({"moe_scorer": "sigmoid"}, "--moe-scorer sigmoid: with --moe-gate relu one of: linear"),
    ],
)
def test_bad_values(moe_options, given, message):
    with pytest.raises(OptionError) as error:
        validate(moe_options(moe_gate="relu", **given))
    assert message in str(error.value)


def test_doubtful_values_are_warned_of(moe_options, caplog):
    validate(moe_options(moe_gate="relu"))
    assert not caplog.text
    validate(moe_options(moe_gate="relu", moe_aux="balance=0.1"))
    assert "--moe-aux without l1" in caplog.text
