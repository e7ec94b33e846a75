import itertools

import pytest
import torch

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.gates.base_layers import BASELayersGate
from evomoe_plugin.gates.context import GateContext, LayerInfo

T, D, E = 30, 8, 4


@pytest.fixture
def make_gate(moe_options):
    def make(experts=E, dim=D, **given):
        return BASELayersGate(LayerInfo(dim, experts), moe_options(moe_gate="base", **given))

    return make


def experts(plan):
    assert plan.token_ids_N.unique().numel() == plan.num_pairs
    return plan.expert_ids_N[plan.token_ids_N.argsort()]


@pytest.mark.parametrize("tokens", [4, 6, 7])
def test_training_takes_the_best_balanced_assignment(make_gate, tokens):
    gate = make_gate(experts=2)
    x = torch.randn(tokens, D)
    scores = x @ gate.scorer.weight.T
    totals = {}
    for choice in itertools.product(range(2), repeat=tokens):
        if abs(choice.count(0) - choice.count(1)) <= tokens % 2:
            totals[choice] = sum(scores[t, e].item() for t, e in enumerate(choice))
    plan = gate(x, GateContext())
    assert tuple(experts(plan).tolist()) == max(totals, key=totals.get)
    wanted = torch.sigmoid(scores[plan.token_ids_N, plan.expert_ids_N])
    assert torch.allclose(plan.weights_N, wanted)
    assert not plan.aux


@pytest.mark.parametrize("skew", [0.0, 5.0])
@pytest.mark.parametrize("padding", [False, True])
def test_every_expert_gets_its_share_of_the_real_tokens(make_gate, skew, padding):
    gate = make_gate()
    x = torch.randn(T, D) + skew
    mask = torch.rand(T) < 0.6 if padding else None
    real = int(mask.sum()) if padding else T
    plan = gate(x, GateContext(token_mask_T=mask))
    assert sorted(plan.tokens_per_expert_E.tolist()) == sorted((real + n) // E for n in range(E))


def test_evaluation_takes_the_best_expert(make_gate):
    gate = make_gate().eval()
    x = torch.randn(T, D) + 5
    plan = gate(x, GateContext())
    scores = x @ gate.scorer.weight.T
    assert torch.equal(experts(plan), scores.argmax(1))
    assert torch.allclose(plan.weights_N[plan.token_ids_N.argsort()], scores.amax(1).sigmoid())
    assert plan.tokens_per_expert_E.max() > T / E + 1


def test_padding_changes_nothing(make_gate):
    gate = make_gate()
    x, mask = torch.randn(T, D), torch.rand(T) < 0.6
    alone = gate(x[mask], GateContext())
    x[~mask] = 1e30
    plan = gate(x, GateContext(token_mask_T=mask))
    assert torch.equal(experts(plan), experts(alone))
    assert plan.token_ids_N.sort().values.tolist() == mask.nonzero().squeeze(1).tolist()


def test_centroids_start_orthogonal_and_short(make_gate):
    weight = make_gate().vectors()
    assert torch.allclose(weight @ weight.T, 0.01 * torch.eye(E), atol=1e-6)
    more = make_gate(experts=12).vectors()  # more experts than dimensions
    assert torch.allclose(more.T @ more, 0.01 * torch.eye(D), atol=1e-6)


def test_gradcheck_of_the_weights(make_gate):
    gate = make_gate().double()
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)

    def weights(x, weight):
        return torch.func.functional_call(
            gate, {"scorer.weight": weight}, (x, GateContext())
        ).weights_N

    assert torch.autograd.gradcheck(weights, (x, gate.scorer.weight), fast_mode=True)


@pytest.mark.parametrize(
    "x",
    [torch.zeros(T, D), torch.full((T, D), 1e30), torch.randn(1, D), torch.zeros(0, D)],
    ids=["equal", "huge", "one token", "no token"],
)
def test_odd_batches(make_gate, x):
    gate = make_gate()
    plan = gate(x.requires_grad_(), GateContext())
    assert plan.num_pairs == x.size(0)
    assert plan.tokens_per_expert_E.max() - plan.tokens_per_expert_E.min() <= 1
    plan.weights_N.sum().backward()
    assert gate.scorer.weight.grad.isfinite().all()


def test_one_expert(make_gate):
    plan = make_gate(experts=1)(torch.randn(T, D), GateContext())
    assert plan.tokens_per_expert_E.tolist() == [T]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_have_an_fp32_gate(make_gate, dtype):
    gate = make_gate().to(dtype)
    plan = gate(torch.randn(T, D).to(dtype), GateContext())
    assert plan.weights_N.dtype == torch.float32
    assert plan.num_pairs == T


def test_training_is_said_not_to_be_causal(moe_options, caplog):
    validate(moe_options(moe_gate="base"))
    assert "not causal" in caplog.text


@pytest.mark.parametrize(
    "given, message",
    [
        ({"moe_capacity_factor": 1.0}, "--moe-capacity-factor 1.0: the gate base sets the load"),
        ({"moe_eval_capacity_factor": 2.0}, "--moe-eval-capacity-factor 2.0"),
        ({"moe_null_experts": 2}, "--moe-null-experts 2: the gate base cannot select null experts"),
        ({"moe_top_k": 1}, "--moe-top-k 1: the gate base does not use it"),
    ],
)
def test_bad_values(moe_options, given, message):
    with pytest.raises(OptionError) as error:
        validate(moe_options(moe_gate="base", **given))
    assert message in str(error.value)
