"""Routing of tokens, counted one by one."""

from __future__ import annotations

from collections import Counter

from evomoe_plugin.routing.plan import RoutingPlan
from evomoe_plugin.routing.stability import NO_EXPERT


def token_routing_by_loops(plan: RoutingPlan) -> tuple[list[int], list[float]]:
    """The first expert and the summed weight of each token of a plan."""
    first, total = [], []
    for token in range(plan.num_tokens):
        pairs = [
            (weight, expert)
            for owner, expert, weight in zip(
                plan.token_ids_N.tolist(),
                plan.expert_ids_N.tolist(),
                plan.weights_N.tolist(),
                strict=True,
            )
            if owner == token
        ]
        largest = max((weight for weight, _ in pairs), default=None)
        first.append(min((e for w, e in pairs if w == largest), default=NO_EXPERT))
        total.append(sum(weight for weight, _ in pairs))
    return first, total


def purity_by_loops(ids: list[int], first: list[int]) -> float:
    """The share of tokens of repeated ids that go to the commonest first expert of their id."""
    repeated = [i for i, n in Counter(ids).items() if n > 1]
    kept = commonest = 0
    for token_id in repeated:
        chosen = Counter(e for i, e in zip(ids, first, strict=True) if i == token_id)
        kept += sum(chosen.values())
        commonest += max(chosen.values())
    return commonest / kept
