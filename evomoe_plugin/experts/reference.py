"""The loop oracle: every expert on every token, masked. Slow and obvious; for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from evomoe_plugin.experts.ffn import ExpertFFN
from evomoe_plugin.routing.plan import RoutingPlan


def loop_moe(x_TD: Tensor, plan: RoutingPlan, experts: ExpertFFN) -> Tensor:
    """Output of the layer, pair by pair, differentiable by autograd.

    Args:
        x_TD: tokens.
        plan: their routing.
        experts: without dropout, or in evaluation mode.
    Returns:
        [T, D].
    """
    rows = [torch.zeros_like(x_TD[0]) for _ in range(x_TD.size(0))]
    pairs = zip(plan.token_ids_N.tolist(), plan.expert_ids_N.tolist(), strict=True)
    for n, (t, e) in enumerate(pairs):
        out = one_expert(x_TD[t], experts, e)
        rows[t] = rows[t] + plan.weights_N[n].to(out.dtype) * out
    return torch.stack(rows)


def one_expert(x_D: Tensor, experts: ExpertFFN, e: int) -> Tensor:
    """Expert e on one token."""
    h = experts.fc1_weight[e] @ x_D
    if experts.gated:
        return (experts.activation(h) * (experts.fc3_weight[e] @ x_D)) @ experts.fc2_weight[e]
    hidden = experts.activation(h + experts.fc1_bias[e])
    return hidden @ experts.fc2_weight[e] + experts.fc2_bias[e]
