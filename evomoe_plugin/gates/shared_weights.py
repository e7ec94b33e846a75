"""Learned weights of shared experts relative to routed ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomoe_plugin.routing.choice import Choice


class SharedWeights(nn.Module):
    """Weights of the S shared experts relative to the routed ones.

    Args:
        kind: `softmax`: one softmax over the logits of the selected candidates and the shared
            experts; the sum of the former scales the routed weights (DCMoE: Uni-MoE 2.0, arXiv
            2511.12609). `mix`: a softmax of two logits of its own, one for the routed and one for
            the shared experts (residual MoE: DeepSpeed-MoE, arXiv 2201.05596, with the learned
            coefficients of its code). `sigmoid`: the sigmoid of a logit for each shared expert;
            routed weights stay as they are (Qwen2-MoE, arXiv 2407.10671).
    """

    def __init__(self, model_dim: int, num_shared: int, kind: str):
        super().__init__()
        self.kind = kind
        self.num_shared = num_shared
        rows = 2 if kind == "mix" else num_shared
        bound = model_dim**-0.5
        self.weight = nn.Parameter(torch.empty(rows, model_dim).uniform_(-bound, bound))

    def forward(self, x_TD: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
        """The factor of the routed weights, [T], and the shared experts' weights, [T, S]."""
        logits = F.linear(x_TD, self.weight.to(x_TD.dtype))
        if self.kind == "sigmoid":
            return logits.new_ones(len(logits)), logits.sigmoid()
        if self.kind == "mix":
            routed_T, shared_T = torch.softmax(logits, dim=1).unbind(1)
            return routed_T, shared_T.unsqueeze(1).expand(-1, self.num_shared)
        assert choice.logits_TC is not None, "softmax needs logits"
        selected_TC = choice.logits_TC.masked_fill(~choice.mask_TC, float("-inf"))
        weights = torch.softmax(torch.cat([selected_TC, logits], dim=1), dim=1)
        candidates = selected_TC.size(1)
        return weights[:, :candidates].sum(1), weights[:, candidates:]
