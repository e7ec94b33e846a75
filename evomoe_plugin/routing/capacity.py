"""Capacity: the maximum number of tokens of an expert, and which ones are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evomoe_plugin.routing.plan import RoutingPlan, waiting_costs


@dataclass(frozen=True)
class CapacityRule:
    """The capacity of training or of evaluation."""

    factor: float = 0.0
    """C = ceil(factor * pairs / experts): 1 is exactly enough for an even load; 0: not used."""
    token_fraction: float = 0.0  # C = ceil(fraction * tokens); 0: not used
    minimum: int = 0  # Lower bound of C
    renormalize: bool = False  # Scale the remaining weights of a token to their sum before dropping

    def __bool__(self) -> bool:
        return self.factor > 0 or self.token_fraction > 0

    def capacity(self, *, num_pairs: int, num_tokens: int, num_experts: int) -> int:
        """C, the maximum number of tokens of an expert.

        Args:
            num_pairs: pairs that the gate requests.
            num_tokens: tokens that are not padding.
        """
        if self.factor > 0:
            # At most all pairs, however large the factor.
            wanted = math.ceil(min(self.factor * num_pairs / max(num_experts, 1), num_pairs))
        else:
            wanted = math.ceil(self.token_fraction * num_tokens)
        return max(wanted, self.minimum)


UNLIMITED = CapacityRule()


def apply_capacity(
    plan: RoutingPlan, capacity: int, *, renormalize: bool = False
) -> tuple[RoutingPlan, Tensor]:
    """Keep at most `capacity` pairs per expert: those of largest priority, then the first.

    Args:
        renormalize: scale a token's remaining weights to their sum before; a token without
            remaining pairs gets nothing.
    Returns:
        the plan of the kept pairs, and the number of dropped pairs per expert, int64 [E].
    """
    counts_E = plan.tokens_per_expert_E
    kept_E = counts_E.clamp(max=capacity)
    if not plan.num_pairs:
        return plan, counts_E - kept_E
    if not waiting_costs(counts_E.device) and torch.equal(kept_E, counts_E):
        return plan, counts_E - kept_E
    order_N = torch.arange(plan.num_pairs, device=counts_E.device)
    if plan.priority_N is not None:
        order_N = plan.priority_N.argsort(descending=True, stable=True)
        order_N = order_N[plan.expert_ids_N[order_N].argsort(stable=True)]
    start_N = (counts_E.cumsum(0) - counts_E)[plan.expert_ids_N]
    place_N = torch.arange(plan.num_pairs, device=counts_E.device) - start_N
    is_kept_N = torch.empty_like(order_N, dtype=torch.bool)
    is_kept_N[order_N] = place_N < capacity
    keep_N = is_kept_N.nonzero().squeeze(1)

    token_ids_N, weights_N = plan.token_ids_N[keep_N], plan.weights_N[keep_N]
    if renormalize:
        before_T = plan.weights_N.new_zeros(plan.num_tokens).index_add(
            0, plan.token_ids_N, plan.weights_N
        )
        after_T = weights_N.new_zeros(plan.num_tokens).index_add(0, token_ids_N, weights_N)
        tiny = torch.finfo(weights_N.dtype).tiny
        weights_N = weights_N * (before_T / after_T.clamp(min=tiny))[token_ids_N]
    return replace(
        plan,
        token_ids_N=token_ids_N,
        expert_ids_N=plan.expert_ids_N[keep_N],
        weights_N=weights_N,
        priority_N=None if plan.priority_N is None else plan.priority_N[keep_N],
        tokens_per_expert_E=kept_E,
    ), counts_E - kept_E
