"""Routing without a gate: every token to expert 0, as in a dense model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.plan import RoutingPlan, plan_from_mask


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
    mask_TE = torch.zeros(len(x_TD), num_experts, dtype=torch.bool, device=x_TD.device)
    mask_TE[:, 0] = True if token_mask_T is None else token_mask_T
    load_E = mask_TE.sum(0).double()
    tokens, zero = load_E[0], torch.zeros((), dtype=torch.float64, device=x_TD.device)
    return plan_from_mask(
        mask_TE,
        x_TD.new_ones(()).expand(mask_TE.shape),
        aux={name: x_TD.new_zeros((), dtype=torch.float32) for name in aux_names},
        stats={
            st.TOKENS: tokens, st.PAIRS: tokens, st.EXPERTS: tokens, st.LOAD_E: load_E,
            **dict.fromkeys([st.ENTROPY, st.NONFINITE, *zero_stats], zero),
        },
    )
