"""Shared experts: feed-forward networks applied to every token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evomoe_plugin.experts.ffn import ExpertFFN


class SharedExperts(nn.Module):
    """The weighted sum of S expert networks on all tokens.

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
            weights_TS: weight of each expert's output; None: 1.
        Returns:
            [T, D].
        """
        tokens, num_shared = x_TD.size(0), self.experts.num_experts
        counts = torch.full((num_shared,), tokens, device=x_TD.device)
        if num_shared == 1 and weights_TS is None:
            return self.experts.forward_rows(x_TD, counts)
        token_ids_N = torch.arange(tokens, device=x_TD.device).repeat(num_shared)
        weights_N = None if weights_TS is None else weights_TS.t().reshape(-1)
        return self.experts.forward_tokens(x_TD, token_ids_N, weights_N, counts)
