"""Stacked expert feed-forward networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from evomoe_plugin.experts.frozen import without_gradient
from evomoe_plugin.experts.grouped import grouped_linear


class ExpertFFN(nn.Module):
    """E feed-forward networks, applied to rows by expert.

    Plain: fc2 dropout(act(fc1 x)), with biases. Gated (Shazeer, arXiv 2002.05202):
    fc2 dropout(act(fc1 x) * fc3 x), without.

    The weights of all experts are one parameter, so that every expert gets a gradient each step
    (zeros where it had no rows) on every rank, whatever the routing.

    Args:
        num_experts: E.
        model_dim: D.
        ffn_dim: F.
        activation: elementwise function.
        dropout: module applied to the hidden rows.
        gated: whether there is an fc3.
        freezes: whether single weights can be held at what they are: a buffer of bools beside
            each matrix, `fc1_frozen` beside `fc1_weight`, says which.
    """

    def __init__(
        self,
        num_experts: int,
        model_dim: int,
        ffn_dim: int,
        activation: Callable[[Tensor], Tensor],
        dropout: nn.Module | None = None,
        gated: bool = False,
        freezes: bool = False,
    ):
        super().__init__()
        self.num_experts = num_experts
        self.freezes = freezes
        self.gated = gated
        self.activation = activation
        self.dropout = dropout or nn.Identity()
        # The bounds of nn.Linear, as in the dense FFN of fairseq's decoder layers.
        for name, shape, fan_in in self._shapes(num_experts, model_dim, ffn_dim, gated):
            bound = fan_in**-0.5
            parameter = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
            self.register_parameter(name, parameter)
            if freezes and name.endswith("_weight"):
                self.register_buffer(frozen_name(name), torch.zeros(shape, dtype=torch.bool))

    @staticmethod
    def _shapes(
        num_experts: int, model_dim: int, ffn_dim: int, gated: bool
    ) -> list[tuple[str, tuple[int, ...], int]]:
        """Name, shape and fan-in of the parameters."""
        matrix = (num_experts, ffn_dim, model_dim)
        if gated:
            return [("fc1_weight", matrix, model_dim), ("fc3_weight", matrix, model_dim),
                    ("fc2_weight", matrix, ffn_dim)]
        return [("fc1_weight", matrix, model_dim), ("fc1_bias", matrix[:2], model_dim),
                ("fc2_weight", matrix, ffn_dim), ("fc2_bias", matrix[::2], ffn_dim)]

    @classmethod
    def num_parameters(
        cls, num_experts: int, model_dim: int, ffn_dim: int, gated: bool = False
    ) -> int:
        """Number of parameters of a stack of these sizes."""
        shapes = cls._shapes(num_experts, model_dim, ffn_dim, gated)
        return sum(math.prod(shape) for _, shape, _ in shapes)

    @staticmethod
    def num_matrices(gated: bool) -> int:
        """Matrices that a row is multiplied by."""
        return 3 if gated else 2

    def _matrix(self, name: str) -> Tensor:
        weight = getattr(self, name)
        if not self.freezes:
            return weight
        return without_gradient(weight, getattr(self, frozen_name(name)))

    def forward(self, rows_ND: Tensor, counts: Sequence[int]) -> Tensor:
        """Apply expert e to its segment of rows.

        Args:
            rows_ND: rows sorted by expert.
            counts: rows of each expert, E numbers that sum to N.
        """
        fc1, fc2 = self._matrix("fc1_weight"), self._matrix("fc2_weight")
        if self.gated:
            fc3 = self._matrix("fc3_weight")
            gates_NF = grouped_linear(rows_ND, fc1.transpose(1, 2), None, counts)
            hidden_NF = grouped_linear(rows_ND, fc3.transpose(1, 2), None, counts)
            hidden_NF = self.dropout(self.activation(gates_NF) * hidden_NF)
            return grouped_linear(hidden_NF, fc2, None, counts)
        hidden_NF = grouped_linear(rows_ND, fc1.transpose(1, 2), self.fc1_bias, counts)
        hidden_NF = self.dropout(self.activation(hidden_NF))
        return grouped_linear(hidden_NF, fc2, self.fc2_bias, counts)

    def extra_repr(self) -> str:
        experts, ffn_dim, model_dim = self.fc1_weight.shape
        return (f"experts={experts}, model_dim={model_dim}, ffn_dim={ffn_dim}, "
                f"gated={self.gated}")


def frozen_name(weight: str) -> str:
    """The buffer that says which elements of the matrix `weight` are held."""
    return weight.removesuffix("_weight") + "_frozen"
