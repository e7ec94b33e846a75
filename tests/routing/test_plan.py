import torch
from hypothesis import given
from hypothesis import strategies as st

from evomoe_plugin.routing.plan import plan_from_mask


@given(st.integers(0, 12), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_pairs_are_exactly_those_of_the_mask_sorted_by_expert_then_token(tokens, experts, seed):
    generator = torch.Generator().manual_seed(seed)
    mask_TE = torch.rand(tokens, experts, generator=generator) < 0.5
    weights_TE = torch.rand(tokens, experts, generator=generator)

    plan = plan_from_mask(mask_TE, weights_TE)

    pairs = list(zip(plan.expert_ids_N.tolist(), plan.token_ids_N.tolist(), strict=True))
    wanted = [(e, t) for e in range(experts) for t in range(tokens) if mask_TE[t, e]]
    assert pairs == wanted
    assert plan.num_pairs == len(wanted)
    assert plan.tokens_per_expert_E.tolist() == [
        sum(expert == e for expert, _ in wanted) for e in range(experts)
    ]
    assert plan.weights_N.tolist() == [weights_TE[t, e].item() for e, t in wanted]


def test_weights_outside_the_mask_get_no_gradient():
    weights_TE = torch.rand(3, 2, requires_grad=True)
    mask_TE = torch.tensor([[True, False], [False, False], [True, True]])
    plan_from_mask(mask_TE, weights_TE).weights_N.sum().backward()
    assert torch.equal(weights_TE.grad, mask_TE.float())
