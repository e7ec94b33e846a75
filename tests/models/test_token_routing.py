"""Where a model says that each token is routed, and where its experts compute it."""

import pytest
import torch

from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.stability import NO_EXPERT
from tests.models.test_encoders import BOTH, batch, make  # noqa: F401
from tests.models.test_encoders import with_distinct_scores as with_distinct_scores_in_stacks
from tests.models.test_every_gate_in_models import GATES, GIVEN, tokens, with_distinct_scores
from tests.routing.loops import token_routing_by_loops

PAD = 1
WAYS = {
    **{gate: {"moe_gate": gate, **GIVEN.get(gate, {})} for gate in GATES},
    "limited": {"moe_gate": "top_k", "moe_eval_capacity_factor": 0.5},
    "null experts": {"moe_gate": "top_k", "moe_null_experts": 6},
    "experts of each layer": {"moe_gate": "top_any", "moe_expert_count": "2,4"},
    "checkpointed": {"moe_gate": "top_k", "checkpoint_activations": True},
}


def recorded_plans(stack):
    """The plan that each layer's experts get, in order."""
    plans = []
    for layer in stack.moe_layers:
        layer.experts.register_forward_pre_hook(lambda _, given: plans.append(given[1]))
    return plans


@pytest.mark.parametrize("way", WAYS)
def test_it_is_that_of_the_experts(make_model, way):
    model = with_distinct_scores(make_model(**WAYS[way])).eval()
    model.set_num_updates(60)
    x = tokens(3, 12)
    x[1, 8:] = PAD
    y, extra = model(x)
    assert "moe_token_routing" not in extra
    plans = recorded_plans(model.decoder)
    z, extra = model(x, with_token_routing=True)
    assert torch.equal(y, z)
    routing = extra["moe_token_routing"]
    assert model.gated_layers == {"": 2} and len(plans) == 2
    for n, plan in enumerate(plans):
        first, total = token_routing_by_loops(plan)  # of length-first positions
        for name, values in ((st.FIRST_EXPERT_T, first), (st.COMBINE_WEIGHT_T, total)):
            wanted = torch.tensor(values, dtype=torch.float64).view(12, 3).t()
            assert torch.allclose(routing[name][n].double(), wanted, atol=1e-6)
        assert (routing[st.FIRST_EXPERT_T][n][x == PAD] == NO_EXPERT).all()
    if way in ("limited", "null experts"):
        assert (routing[st.FIRST_EXPERT_T][:, x != PAD] == NO_EXPERT).any()
    if way == "top_any":
        assert len({len(plan.weights_N) for plan in plans} | {3 * 12}) > 1


def test_gates_that_are_not_in_use_route_nothing(make_model):
    model = make_model(moe_spawn_updates=5)
    with pytest.raises(ValueError, match="evaluation mode"):
        model(tokens(), with_token_routing=True)
    model.eval()
    assert model.gated_layers == {}
    with pytest.raises(ValueError, match="evaluation mode"):
        model(tokens(), with_token_routing=True)
    model.set_num_updates(5)
    assert model.gated_layers == {"": 2}
    assert "moe_token_routing" in model(tokens(), with_token_routing=True)[1]


@BOTH
def test_each_side_has_its_own(make, family):  # noqa: F811
    given = {"moe_gate": "top_k", "moe_null_experts": 6, "moe_spawn_updates": 5}
    model, inputs = make(family, **given).eval(), batch(family)
    with pytest.raises(ValueError, match="evaluation mode"):
        model(**inputs, with_token_routing=True)
    assert model.gated_layers == {}
    model.set_num_updates(5)
    model = with_distinct_scores_in_stacks(model)
    plans = {prefix: recorded_plans(stack) for prefix, stack in model.moe_stacks.items()}
    y, extra = model(**inputs, with_token_routing=True)
    assert model.gated_layers == dict.fromkeys(plans, 1)
    assert extra["moe_token_routing"].keys() == {p + name for p in plans for name in st.OF_TOKENS}
    for prefix, (plan,) in plans.items():
        ids = inputs["prev_output_tokens" if prefix == "decoder_" else "src_tokens"]
        first, total = token_routing_by_loops(plan)
        for name, values in ((st.FIRST_EXPERT_T, first), (st.COMBINE_WEIGHT_T, total)):
            wanted = torch.tensor(values, dtype=torch.float64).view(ids.t().shape).t()
            found = extra["moe_token_routing"][prefix + name][0]
            assert torch.allclose(found.double(), wanted, atol=1e-6)
        assert (extra["moe_token_routing"][prefix + st.FIRST_EXPERT_T][0][ids == PAD] < 0).all()
    assert torch.equal(y, model(**inputs)[0])
    assert "moe_token_routing" not in model(**inputs)[1]
