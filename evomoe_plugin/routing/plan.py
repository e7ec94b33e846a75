"""The routing plan: a gate's decision as a value.

Shape suffixes, here and everywhere in the package:

    T  tokens               E  routed experts        N  routed (token, expert) pairs
    D  model width          F  expert hidden width   S  shared experts
    K  experts of a token   L  MoE layers            V  token ids of the vocabulary
    C  candidates of the gate: the E routed experts, then the null experts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class RoutingPlan:
    """The routed (token, expert) pairs and their weights.

    A token has any number of pairs from 0 to E. Every field but `weights_N`,
    `shared_weights_TS` and the values of `aux` is detached.
    """

    token_ids_N: Tensor
    """int64: the token of each pair; pairs are sorted by expert, stable in token order."""
    expert_ids_N: Tensor  # int64: the expert of each pair, ascending
    weights_N: Tensor  # Combine weights of the experts' outputs, with gradient
    tokens_per_expert_E: Tensor  # int64: number of pairs of each expert
    num_tokens: int  # T
    priority_N: Tensor | None = None  # Priority under a capacity, larger first; None: by position
    shared_weights_TS: Tensor | None = None  # Weights of the shared experts; None: 1
    null_mass_T: Tensor | None = None  # Weight of the null experts of each token
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    """Auxiliary losses by name: unweighted scalars with gradient."""
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    """Sums that may be added over layers, ranks and micro-batches."""

    @property
    def num_pairs(self) -> int:
        """N."""
        return self.token_ids_N.numel()


def plan_from_mask(mask_TE: Tensor, weights_TE: Tensor, **fields) -> RoutingPlan:
    """The plan of the pairs in `mask_TE`, with the weights `weights_TE`.

    Args:
        mask_TE: bool.
        weights_TE: combine weights; values outside the mask are ignored and get no gradient.
        fields: further fields of the plan.
    """
    # nonzero of the transpose is in the order of the plan: by expert, then by token.
    expert_ids_N, token_ids_N = mask_TE.t().nonzero(as_tuple=True)
    return RoutingPlan(
        token_ids_N=token_ids_N,
        expert_ids_N=expert_ids_N,
        weights_N=weights_TE[token_ids_N, expert_ids_N],
        tokens_per_expert_E=mask_TE.sum(0),
        num_tokens=mask_TE.size(0),
        **fields,
    )
