"""Where each token is routed, how that changes during training, and how it follows token ids.

StableMoE (arXiv 2204.08396) calls it routing fluctuation that the target expert of a token changes
during training; `stability` is the share of tokens whose expert does not. `purity` is that of a
clustering (Manning, Raghavan and Schütze, Introduction to Information Retrieval, section 16.3),
with token ids as clusters and experts as classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.plan import RoutingPlan

NO_EXPERT = -1  # In place of the first expert of a token without one


def token_routing(plan: RoutingPlan) -> dict[str, Tensor]:
    """Where each token goes, detached.

    Args:
        plan: after the capacity.
    Returns:
        `first_expert`, int64 [T]: the routed expert with the largest combine weight, the first of
        equals, or `NO_EXPERT`; `combine_weight`, fp64 [T]: the sum of the combine weights.
    """
    plan = plan.first(int(plan.tokens_per_expert_E.sum()))
    ids_N, experts_N = plan.token_ids_N, plan.expert_ids_N
    weights_N = plan.weights_N.detach().double()
    largest_T = weights_N.new_full((plan.num_tokens,), -torch.inf)
    largest_T.scatter_reduce_(0, ids_N, weights_N, "amax")
    is_largest_N = weights_N == largest_T[ids_N]
    num_experts = plan.tokens_per_expert_E.numel()
    first_T = ids_N.new_full((plan.num_tokens,), num_experts)
    first_T.scatter_reduce_(0, ids_N[is_largest_N], experts_N[is_largest_N], "amin")
    return {
        st.FIRST_EXPERT_T: first_T.masked_fill(first_T == num_experts, NO_EXPERT),
        st.COMBINE_WEIGHT_T: weights_N.new_zeros(plan.num_tokens).index_add_(0, ids_N, weights_N),
    }


def stability(first_LT: Tensor, earlier_LT: Tensor) -> Tensor:
    """The share of tokens with the same first expert as earlier, fp64 [L].

    Args:
        first_LT: first experts of at least one token.
        earlier_LT: those of the same tokens at an earlier update.
    """
    return (first_LT == earlier_LT).double().mean(1)


def purity(token_ids_T: Tensor, first_LT: Tensor) -> Tensor | None:
    """The share of tokens whose first expert is the commonest one of their token id, fp64 [L].

    Args:
        token_ids_T: int64; tokens whose id is not repeated are left out.
        first_LT: int64 first experts; `NO_EXPERT` counts as one.
    Returns:
        None if no id is repeated.
    """
    _, index_T, counts_V = token_ids_T.unique(return_inverse=True, return_counts=True)
    is_repeated_T = counts_V[index_T] > 1
    if not is_repeated_T.any():
        return None
    index_T, first_LT = index_T[is_repeated_T], first_LT[:, is_repeated_T] - NO_EXPERT
    width = int(first_LT.max()) + 1
    cells = len(counts_V) * width
    commonest_L = [
        torch.bincount(index_T * width + first_T, minlength=cells).view(-1, width).amax(1).sum()
        for first_T in first_LT
    ]
    return torch.stack(commonest_L).double() / len(index_T)
