"""Stacked expert feed-forward networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from evomoe_plugin.experts.grouped import grouped_linear


class ExpertFFN(nn.Module):
    """E feed-forward networks fc1 -> activation -> dropout -> fc2, applied to rows by expert.

    The weights of all experts are one parameter, so that every expert gets a gradient each step
    (zeros where it had no rows) on every rank, whatever the routing.

    Args:
        num_experts: E.
        model_dim: D.
        ffn_dim: F.
        activation: elementwise function.
        dropout: module applied to the hidden rows.
    """

    def __init__(
        self,
        num_experts: int,
        model_dim: int,
        ffn_dim: int,
        activation: Callable[[Tensor], Tensor],
        dropout: nn.Module | None = None,
    ):
        super().__init__()
        self.activation = activation
        self.dropout = dropout or nn.Identity()
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, ffn_dim, model_dim))
        self.fc1_bias = nn.Parameter(torch.empty(num_experts, ffn_dim))
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, ffn_dim, model_dim))
        self.fc2_bias = nn.Parameter(torch.empty(num_experts, model_dim))
        # The bounds of nn.Linear, as in the dense FFN of fairseq's decoder layers.
        for parameter, fan_in in [
            (self.fc1_weight, model_dim), (self.fc1_bias, model_dim),
            (self.fc2_weight, ffn_dim), (self.fc2_bias, ffn_dim),
        ]:
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

    @staticmethod
    def num_parameters(num_experts: int, model_dim: int, ffn_dim: int) -> int:
        """Number of parameters of a stack of these sizes."""
        return num_experts * (2 * model_dim * ffn_dim + ffn_dim + model_dim)

    def forward(self, rows_ND: Tensor, counts: Sequence[int]) -> Tensor:
        """Apply expert e to its segment of rows.

        Args:
            rows_ND: rows sorted by expert.
            counts: rows of each expert, E numbers that sum to N.
        """
        hidden_NF = grouped_linear(rows_ND, self.fc1_weight.transpose(1, 2), self.fc1_bias, counts)
        hidden_NF = self.dropout(self.activation(hidden_NF))
        return grouped_linear(hidden_NF, self.fc2_weight, self.fc2_bias, counts)

    def extra_repr(self) -> str:
        experts, ffn_dim, model_dim = self.fc1_weight.shape
        return f"experts={experts}, model_dim={model_dim}, ffn_dim={ffn_dim}"
