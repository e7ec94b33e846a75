"""Capacity against a loop that fills experts one pair at a time."""

import math

import pytest
import torch

from evomoe_plugin.routing.capacity import CapacityRule, apply_capacity
from evomoe_plugin.routing.plan import plan_from_mask

T, E = 23, 5


def make_plan(share=0.5, priority=None, dtype=torch.float64):
    mask = torch.rand(T, E) < share
    weights = torch.rand(T, E, dtype=dtype, requires_grad=True)
    plan = plan_from_mask(mask, weights)
    if priority is not None:
        values = {
            "distinct": torch.rand(plan.num_pairs),
            "tied": torch.randint(0, 3, (plan.num_pairs,)).float(),
        }[priority]
        plan = plan_from_mask(mask, weights, priority_N=values)
    return plan


def fill(plan, capacity):
    """The pairs that are kept, as a set of (token, expert)."""
    pairs = list(zip(plan.token_ids_N.tolist(), plan.expert_ids_N.tolist(), strict=True))
    wish = [0.0] * len(pairs) if plan.priority_N is None else plan.priority_N.tolist()
    kept, load = set(), [0] * E
    for n in sorted(range(len(pairs)), key=lambda n: (-wish[n], pairs[n][0])):
        if load[pairs[n][1]] < capacity:
            load[pairs[n][1]] += 1
            kept.add(pairs[n])
    return kept


@pytest.mark.parametrize("priority", [None, "distinct", "tied"])
@pytest.mark.parametrize("capacity", [0, 1, 4, 10, 1000])
def test_who_is_kept(capacity, priority):
    plan = make_plan(priority=priority)
    kept, dropped = apply_capacity(plan, capacity)
    pairs = list(zip(kept.token_ids_N.tolist(), kept.expert_ids_N.tolist(), strict=True))
    assert set(pairs) == fill(plan, capacity)
    assert pairs == sorted(pairs, key=lambda pair: (pair[1], pair[0]))  # the plan's promise
    assert kept.tokens_per_expert_E.tolist() == kept.expert_ids_N.bincount(minlength=E).tolist()
    assert kept.tokens_per_expert_E.max() <= capacity
    assert torch.equal(kept.tokens_per_expert_E + dropped, plan.tokens_per_expert_E)
    weights = dict(
        zip(
            zip(plan.token_ids_N.tolist(), plan.expert_ids_N.tolist(), strict=True),
            plan.weights_N.tolist(),
            strict=True,
        )
    )
    assert kept.weights_N.tolist() == [weights[pair] for pair in pairs]


def test_renormalized_tokens_get_back_the_weight_they_had():
    plan = make_plan(0.8)
    kept, _ = apply_capacity(plan, 6, renormalize=True)
    before = torch.zeros(T, dtype=torch.float64).index_add(0, plan.token_ids_N, plan.weights_N)
    after = torch.zeros(T, dtype=torch.float64).index_add(0, kept.token_ids_N, kept.weights_N)
    survivors = torch.zeros(T, dtype=torch.bool)
    survivors[kept.token_ids_N] = True
    assert not survivors.all()
    assert torch.allclose(after[survivors], before[survivors])
    assert not after[~survivors].any()


@pytest.mark.parametrize("renormalize", [False, True])
def test_gradients_of_the_weights(renormalize):
    mask = torch.rand(T, E) < 0.7
    weights = (torch.rand(T, E, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: apply_capacity(plan_from_mask(mask, w), 5, renormalize=renormalize)[0].weights_N,
        weights,
        fast_mode=True,
    )


def test_nothing_to_drop_is_the_same_plan():
    plan = make_plan()
    assert apply_capacity(plan, T)[0] is plan
    empty = make_plan(0.0)
    assert apply_capacity(empty, 3)[0] is empty


@pytest.mark.parametrize(
    "rule, wanted",
    [
        (CapacityRule(factor=1.0), 20),
        (CapacityRule(factor=1.25), 25),
        (CapacityRule(factor=0.01), 1),
        (CapacityRule(factor=0.01, minimum=8), 8),
        (CapacityRule(token_fraction=0.25), 13),
        (CapacityRule(token_fraction=1.0), 50),
        (CapacityRule(factor=1e6), 100),
        (CapacityRule(factor=1e308), 100),
    ],
)
def test_capacity_of_100_pairs_50_tokens_5_experts(rule, wanted):
    assert rule
    sizes = dict(num_pairs=torch.tensor(100), num_tokens=torch.tensor(50.0, dtype=torch.float64))
    assert rule.capacity(**sizes, num_experts=5) == wanted


def test_capacity_grows_with_the_picks():
    """A published capacity shrank with k, and ignored the number of experts."""
    rule = CapacityRule(factor=1.2)
    tokens = torch.tensor(64.0, dtype=torch.float64)
    sizes = [
        rule.capacity(num_pairs=torch.tensor(64 * k), num_tokens=tokens, num_experts=8)
        for k in (1, 2, 4)
    ]
    assert sizes == [math.ceil(1.2 * 8 * k) for k in (1, 2, 4)]


def test_no_rule_is_false():
    assert not CapacityRule()
    assert not CapacityRule(minimum=4)
