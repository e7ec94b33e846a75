"""Routing without a gate: every token to expert 0, as in a dense model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.plan import RoutingPlan


def first_expert_plan(
    x_TD: Tensor, token_mask_T: Tensor | None, num_experts: int, *, aux_names: Iterable[str] = (),
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
    device = x_TD.device
    if token_mask_T is None:
        token_ids_N = torch.arange(x_TD.size(0), device=device)
    else:
        token_ids_N = token_mask_T.nonzero().squeeze(1)
    pairs = token_ids_N.numel()
    load_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
    load_E[0] = pairs
    tokens, zero = load_E[0].double(), torch.zeros((), dtype=torch.float64, device=device)
    return RoutingPlan(
        token_ids_N=token_ids_N,
        expert_ids_N=torch.zeros_like(token_ids_N),
        weights_N=x_TD.new_ones(pairs),
        tokens_per_expert_E=load_E,
        num_tokens=x_TD.size(0),
        aux={name: x_TD.new_zeros((), dtype=torch.float32) for name in aux_names},
        stats={
            st.TOKENS: tokens, st.PAIRS: tokens, st.EXPERTS: tokens, st.LOAD_E: load_E.double(),
            **dict.fromkeys([st.ENTROPY, st.NONFINITE, *zero_stats], zero),
        },
    )
