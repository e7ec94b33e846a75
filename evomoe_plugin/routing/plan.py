"""The routing plan: a gate's decision as a value.

Shape suffixes, here and everywhere in the package:

    T  tokens               E  routed experts        N  routed (token, expert) pairs
    D  model width          F  expert hidden width   S  shared experts
    K  experts of a token   L  MoE layers            V  token ids of the vocabulary
    C  candidates of the gate: the E routed experts, then the null experts
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from evomoe_plugin.routing import kernels, waits
from evomoe_plugin.routing import stats as st


@dataclass(frozen=True)
class RoutingPlan:
    """The routed (token, expert) pairs and their weights.

    A token has any number of pairs from 0 to E. Every field but `weights_N`,
    `shared_weights_TS` and the values of `aux` is detached.

    On a GPU there may be fewer pairs than N: their number, the sum of `tokens_per_expert_E`, is
    known to the device alone. Those that are none come last, with token and expert -1 and weight 0.
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
    by_token: tuple[Tensor, Tensor] | None = None
    """The pairs of each token, where that is known: the places of pairs sorted by token, int64 [N],
    and the first of each token's among them, with the end, [T + 1]."""
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    """Auxiliary losses by name: unweighted scalars with gradient."""
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    """Sums that may be added over layers, ranks and micro-batches."""

    @property
    def num_pairs(self) -> int:
        """N."""
        return self.token_ids_N.numel()

    def first(self, num_pairs: int) -> RoutingPlan:
        """The plan with N = `num_pairs`, without those that are none."""
        if num_pairs == self.num_pairs:
            return self
        fields = ("token_ids_N", "expert_ids_N", "weights_N", "priority_N")
        values = {name: getattr(self, name) for name in fields}
        cut = {name: value[:num_pairs] for name, value in values.items() if value is not None}
        return replace(self, **cut)


def plan_from_mask(
    mask_TE: Tensor, weights_TE: Tensor, most_pairs: int | None = None, **fields
) -> RoutingPlan:
    """The plan of the pairs in `mask_TE`, with the weights `weights_TE`.

    On a GPU the host waits for the number of pairs only if neither `most_pairs` is given nor a
    bound small enough (`waits.MOST_UNCOUNTED`).

    Args:
        mask_TE: bool.
        weights_TE: combine weights; values outside the mask are ignored and get no gradient.
        most_pairs: how many there are at most, if known.
        fields: further fields of the plan.
    """
    if most_pairs is None and mask_TE.numel() <= waits.MOST_UNCOUNTED:
        most_pairs = mask_TE.numel()
    if kernels.usable(mask_TE.device):
        from evomoe_plugin.routing.kernels.pairs import sorted_pairs

        pairs = sorted_pairs(mask_TE, weights_TE, most_pairs)
        return RoutingPlan(
            token_ids_N=pairs.token_ids_N,
            expert_ids_N=pairs.expert_ids_N,
            weights_N=pairs.weights_N,
            tokens_per_expert_E=pairs.tokens_per_expert_E,
            num_tokens=mask_TE.size(0),
            by_token=(pairs.order_N, pairs.starts),
            **fields,
        )
    # nonzero of the transpose is in the order of the plan: by expert, then by token.
    if most_pairs is None or not waits.waiting_costs(mask_TE.device):
        expert_ids_N, token_ids_N = mask_TE.t().nonzero(as_tuple=True)
        weights_N = weights_TE[token_ids_N, expert_ids_N]
    else:
        found_N2 = mask_TE.t().nonzero_static(size=most_pairs, fill_value=-1)
        expert_ids_N, token_ids_N = found_N2.t().contiguous()
        weights_N = weights_TE[token_ids_N, expert_ids_N].masked_fill(token_ids_N < 0, 0.0)
    return RoutingPlan(
        token_ids_N=token_ids_N,
        expert_ids_N=expert_ids_N,
        weights_N=weights_N,
        tokens_per_expert_E=mask_TE.sum(0),
        num_tokens=mask_TE.size(0),
        **fields,
    )


def first_expert_plan(
    x_TD: Tensor,
    token_mask_T: Tensor | None,
    num_experts: int,
    *,
    aux_names: Iterable[str] = (),
    zero_stats: Iterable[str] = (),
) -> RoutingPlan:
    """The plan that routes each token to expert 0 with weight 1.

    Its statistics are those of one expert. Auxiliary losses are 0, without gradient.

    Args:
        x_TD: the tokens.
        token_mask_T: bool, False for padding, which is not routed; None: no padding.
        num_experts: E.
        aux_names: names of the losses.
        zero_stats: names of further statistics, all 0.
    """
    mask_TE = torch.zeros(len(x_TD), num_experts, dtype=torch.bool, device=x_TD.device)
    if token_mask_T is None:
        mask_TE[:, 0].fill_(True)
    else:
        mask_TE[:, 0] = token_mask_T
    load_E = mask_TE.sum(0).double()
    tokens, zero = load_E[0], torch.zeros((), dtype=torch.float64, device=x_TD.device)
    return plan_from_mask(
        mask_TE,
        x_TD.new_ones(()).expand(mask_TE.shape),
        len(x_TD),
        aux={name: x_TD.new_zeros((), dtype=torch.float32) for name in aux_names},
        stats={
            st.TOKENS: tokens,
            st.PAIRS: tokens,
            st.EXPERTS: tokens,
            st.LOAD_E: load_E,
            **dict.fromkeys([st.ENTROPY, st.NONFINITE, *zero_stats], zero),
        },
    )
