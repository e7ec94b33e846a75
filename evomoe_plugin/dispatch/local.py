"""Local dispatch: gather rows by expert, scatter-add the weighted results."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from evomoe_plugin.routing.plan import RoutingPlan


@dataclass(frozen=True)
class Dispatched:
    """Rows at their experts. Only the dispatcher that made it reads anything but the first two."""

    rows_ND: Tensor
    """Rows sorted by expert."""
    counts: list[int]
    """Rows of each expert."""
    plan: RoutingPlan


class LocalDispatcher:
    """All experts live in this process. No parameters, so no module."""

    def dispatch(self, x_TD: Tensor, plan: RoutingPlan) -> Dispatched:
        """Copy each token to a row per pair: [N, D], sorted by expert."""
        return Dispatched(
            rows_ND=x_TD.index_select(0, plan.token_ids_N),
            counts=plan.tokens_per_expert_E.tolist(),
            plan=plan,
        )

    def combine(self, rows_ND: Tensor, dispatched: Dispatched) -> Tensor:
        """Sum each token's rows, weighted: [T, D]; a token without a pair gets zeros."""
        plan = dispatched.plan
        weighted_ND = rows_ND * plan.weights_N.to(rows_ND.dtype).unsqueeze(1)
        y_TD = rows_ND.new_zeros(plan.num_tokens, rows_ND.size(1))
        return y_TD.index_add(0, plan.token_ids_N, weighted_ND)
