"""First experts, stability and purity, as loops over tokens count them."""

import pytest
import torch

from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.capacity import apply_capacity
from evomoe_plugin.routing.plan import plan_from_mask
from evomoe_plugin.routing.stability import NO_EXPERT, purity, stability, token_routing
from tests.routing.loops import purity_by_loops, token_routing_by_loops

T, E, L = 40, 5, 3


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("limited", [False, True])
def test_token_routing(ties, limited):
    mask_TE = torch.rand(T, E) < 0.4
    mask_TE[7] = False
    weights_TE = torch.randint(1, 3, (T, E)).double() if ties else torch.rand(T, E).double()
    plan = plan_from_mask(mask_TE, weights_TE.requires_grad_())
    if limited:
        plan, dropped_E = apply_capacity(plan, 12)
        assert dropped_E.any()
    routing = token_routing(plan)
    first, total = token_routing_by_loops(plan)
    assert routing[st.FIRST_EXPERT_T].tolist() == first
    assert first[7] == NO_EXPERT and len(set(first)) == E + 1
    assert routing[st.COMBINE_WEIGHT_T].tolist() == pytest.approx(total, abs=1e-12)
    assert not any(value.requires_grad for value in routing.values())


def test_weights_of_zero_and_below_are_weights():
    plan = plan_from_mask(torch.tensor([[True, True], [False, True]]), -torch.eye(2))
    assert token_routing(plan)[st.FIRST_EXPERT_T].tolist() == [1, 1]


def test_no_tokens():
    plan = plan_from_mask(torch.zeros(0, E, dtype=torch.bool), torch.zeros(0, E))
    assert all(len(value) == 0 for value in token_routing(plan).values())


def test_stability_and_purity():
    ids_T = torch.randint(0, 25, (T,))
    first_LT, earlier_LT = torch.randint(NO_EXPERT, E, (2, L, T))
    for n in range(L):
        now, before = first_LT[n].tolist(), earlier_LT[n].tolist()
        kept = sum(a == b for a, b in zip(now, before, strict=True))
        assert stability(first_LT, earlier_LT)[n] == pytest.approx(kept / T)
        assert purity(ids_T, first_LT)[n] == pytest.approx(purity_by_loops(ids_T.tolist(), now))


def test_purity_needs_a_repeated_id():
    first_LT = torch.zeros(L, 4, dtype=torch.int64)
    assert purity(torch.arange(4), first_LT) is None
    # Id 3 occurs once, at an expert of its own.
    assert purity(torch.tensor([5, 3, 5, 5]), torch.tensor([[2, 0, 2, 1]])).tolist() == [2 / 3]
