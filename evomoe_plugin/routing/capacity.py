"""Capacity: the maximum number of tokens of an expert, and which ones are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from evomoe_plugin.routing import waits
from evomoe_plugin.routing.plan import RoutingPlan


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

    def capacity(
        self, *, num_pairs: Tensor, num_tokens: Tensor, num_experts: Tensor | int
    ) -> Tensor:
        """C, the maximum number of tokens of an expert, int64.

        Args:
            num_pairs: pairs that the gate requests.
            num_tokens: tokens that are not padding.
        """
        if self.factor > 0:
            pairs = num_pairs.double()
            even = self.factor * pairs / num_experts
            wanted = torch.minimum(even, pairs)  # at most all, however large the factor
        else:
            wanted = self.token_fraction * num_tokens
        return wanted.ceil().long().clamp(min=self.minimum)


UNLIMITED = CapacityRule()


def apply_capacity(
    plan: RoutingPlan, capacity: Tensor | int, *, renormalize: bool = False
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
    dropped_E = counts_E - kept_E
    on_device = waits.waiting_costs(counts_E.device)
    if not plan.num_pairs or (not on_device and torch.equal(kept_E, counts_E)):
        return plan, dropped_E
    E = counts_E.numel()
    expert_ids_N = plan.expert_ids_N.remainder(E + 1)  # -1, of no pair, comes last
    order_N = torch.arange(plan.num_pairs, device=counts_E.device)
    place_N = order_N - (pad(counts_E, (1, 0)).cumsum(0))[expert_ids_N]
    if plan.priority_N is not None:
        order_N = plan.priority_N.argsort(descending=True, stable=True)
        order_N = order_N[expert_ids_N[order_N].argsort(stable=True)]
    is_kept_N = torch.empty_like(order_N, dtype=torch.bool)
    is_kept_N[order_N] = (place_N < capacity) & (expert_ids_N < E)
    if on_device:
        keep_N = is_kept_N.nonzero_static(size=plan.num_pairs, fill_value=-1).squeeze(1)
        kept = _taken(plan, keep_N.clamp(min=0), keep_N < 0)
    else:
        kept = _taken(plan, is_kept_N.nonzero().squeeze(1), None)
    if renormalize:
        before_T = _weights_of_tokens(plan)
        after_T = _weights_of_tokens(kept).clamp(min=torch.finfo(plan.weights_N.dtype).tiny)
        factors_N = (before_T / after_T)[kept.token_ids_N.clamp(min=0)]
        kept = replace(kept, weights_N=kept.weights_N * factors_N)
    return replace(kept, tokens_per_expert_E=kept_E), dropped_E


def _taken(plan: RoutingPlan, index_N: Tensor, is_none_N: Tensor | None) -> RoutingPlan:
    """The pairs at `index_N`, but for those that are none."""

    def take(values_N: Tensor, none: float) -> Tensor:
        taken_N = values_N[index_N]
        return taken_N if is_none_N is None else taken_N.masked_fill(is_none_N, none)

    return replace(
        plan,
        token_ids_N=take(plan.token_ids_N, -1),
        expert_ids_N=take(plan.expert_ids_N, -1),
        weights_N=take(plan.weights_N, 0.0),
        priority_N=None if plan.priority_N is None else take(plan.priority_N, 0.0),
        by_token=None,
    )


def _weights_of_tokens(plan: RoutingPlan) -> Tensor:
    """The sum of each token's combine weights, [T]."""
    sums_T = plan.weights_N.new_zeros(plan.num_tokens)
    return sums_T.index_add(0, plan.token_ids_N.clamp(min=0), plan.weights_N)
