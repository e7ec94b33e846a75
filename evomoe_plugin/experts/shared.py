"""Shared experts: feed-forward networks that every token goes to."""

from __future__ import annotations

from torch import Tensor, nn

from evomoe_plugin.experts.ffn import ExpertFFN


class SharedExperts(nn.Module):
    """S expert networks on all tokens, summed with weights.

    Args:
        experts: a stack of S.
    """

    def __init__(self, experts: ExpertFFN):
        super().__init__()
        self.experts = experts

    def forward(self, x_TD: Tensor, weights_TS: Tensor | None) -> Tensor:
        """Apply them.

        Args:
            x_TD: tokens.
            weights_TS: what each expert's output is multiplied by; None: 1.
        Returns:
            [T, D].
        """
        tokens, num_shared = x_TD.size(0), self.experts.num_experts
        rows_ND = self.experts(x_TD.repeat(num_shared, 1), [tokens] * num_shared)
        rows_STD = rows_ND.view(num_shared, tokens, x_TD.size(1))
        if weights_TS is not None:
            rows_STD = rows_STD * weights_TS.t().unsqueeze(2).to(rows_STD.dtype)
        return rows_STD.sum(0)
