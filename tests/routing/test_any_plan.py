"""Design invariant 2 on plans that hypothesis thinks of: no pair is lost or made up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomoe_plugin.experts.activations import find_activation
from evomoe_plugin.experts.kernels.cpu.grouped import grouped_ffn
from evomoe_plugin.routing.capacity import apply_capacity
from evomoe_plugin.routing.plan import plan_from_mask


@st.composite
def plans(draw):
    tokens, experts = draw(st.integers(0, 12)), draw(st.integers(1, 6))
    size = tokens * experts
    bits = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    weights = draw(st.lists(st.integers(0, 8), min_size=size, max_size=size))
    mask_TE = torch.tensor(bits, dtype=torch.bool).view(tokens, experts)
    plan = plan_from_mask(mask_TE, torch.tensor(weights, dtype=torch.float64).view_as(mask_TE) / 8)
    if draw(st.booleans()):
        wishes = draw(st.lists(st.integers(0, 3), min_size=plan.num_pairs, max_size=plan.num_pairs))
        plan = plan_from_mask(
            mask_TE,
            torch.ones_like(mask_TE, dtype=torch.float64),
            priority_N=torch.tensor(wishes, dtype=torch.float32),
        )
    return mask_TE, plan, draw(st.integers(0, 14)), draw(st.booleans())


def pairs_of(plan):
    return list(zip(plan.token_ids_N.tolist(), plan.expert_ids_N.tolist(), strict=True))


def check(case):
    mask_TE, plan, capacity, renormalize = case
    tokens, experts = mask_TE.shape
    assert set(pairs_of(plan)) == {tuple(pair) for pair in mask_TE.nonzero().tolist()}

    kept, dropped_E = apply_capacity(plan, capacity, renormalize=renormalize)
    assert set(pairs_of(kept)) <= set(pairs_of(plan))
    assert kept.num_pairs + int(dropped_E.sum()) == plan.num_pairs
    assert (kept.tokens_per_expert_E <= capacity).all()
    full_E = dropped_E > 0
    assert (kept.tokens_per_expert_E[full_E] == capacity).all()  # no slot is left unused
    assert kept.expert_ids_N.bincount(minlength=experts).tolist() == (
        kept.tokens_per_expert_E.tolist()
    )

    # Experts that double what they get: each token must get back its weight, and nothing else.
    x_TD = torch.arange(1, tokens + 1, dtype=torch.float64).unsqueeze(1)
    one = torch.ones(experts, 1, 1, dtype=torch.float64)
    y_TD = grouped_ffn(
        x_TD,
        {"fc1_weight": one, "fc2_weight": 2 * one},
        kept.tokens_per_expert_E,
        find_activation(torch.nn.functional.relu),
        token_ids_N=kept.token_ids_N,
        weights_N=kept.weights_N,
    )
    weight_T = torch.zeros(tokens, dtype=torch.float64)
    for n, (t, _) in enumerate(pairs_of(kept)):
        weight_T[t] += kept.weights_N[n]
    assert torch.allclose(y_TD, 2 * weight_T.unsqueeze(1) * x_TD)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(plans())
def test_pairs_are_conserved(case):
    check(case)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, derandomize=True, database=None)
@given(plans())
def test_pairs_are_conserved_in_ten_thousand_plans(case):
    check(case)
