"""Stacked expert feed-forward networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from evomoe_plugin.experts.activations import find_activation
from evomoe_plugin.experts.kernels.cpu.grouped import grouped_ffn
from evomoe_plugin.routing.plan import RoutingPlan


class ExpertStack(nn.Module):
    """E feed-forward networks.

    Plain: fc2 dropout(act(fc1 x)), with biases. Gated (Shazeer, arXiv 2002.05202):
    fc2 dropout(act(fc1 x) * fc3 x), without.

    The weights of all experts are one parameter, so that every expert gets a gradient each step
    (zeros where it had no rows) on every rank, whatever the routing.

    Args:
        num_experts: E.
        model_dim: D.
        ffn_dim: F.
        activation: elementwise function.
        dropout: of the hidden rows; its `p` and its training mode are used.
        gated: whether there is an fc3.
        freezes: whether single weights can be frozen, by a bool buffer for each matrix:
            `fc1_frozen` for `fc1_weight`.
    """

    fc1_weight: Tensor  # [E, F, D], as the other matrices
    fc2_weight: Tensor
    fc3_weight: Tensor
    fc1_bias: Tensor  # [E, F]
    fc2_bias: Tensor  # [E, D]

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
        self.grad_scale = 1.0  # factor of the parameters' gradients
        shapes = self._shapes(num_experts, model_dim, ffn_dim, gated)
        self._names = [name for name, _, _ in shapes]
        # The bounds of nn.Linear, as in the dense FFN of fairseq's decoder layers.
        for name, shape, fan_in in shapes:
            parameter = self._new_parameter(shape, fan_in**-0.5)
            self.register_parameter(name, parameter)
            if freezes and name.endswith("_weight"):
                frozen = torch.zeros(parameter.shape, dtype=torch.bool)
                self.register_buffer(frozen_name(name), frozen)

    @property
    def matrix_names(self) -> list[str]:
        """Names of the parameters that are stacks of matrices; the others are biases."""
        return [name for name in self._names if name.endswith("_weight")]

    def _new_parameter(self, shape: tuple[int, ...], bound: float) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

    @torch.no_grad()
    def rescale(self, deviation: float) -> None:
        """Give initial weights another standard deviation, and set biases to 0."""
        _, F, D = self.fc1_weight.shape
        for name in self._names:
            fan_in = F if name.startswith("fc2") else D
            factor = 0.0 if name.endswith("_bias") else deviation * (3 * fan_in) ** 0.5
            self.get_parameter(name).mul_(factor)

    @staticmethod
    def _shapes(
        num_experts: int, model_dim: int, ffn_dim: int, gated: bool
    ) -> list[tuple[str, tuple[int, ...], int]]:
        """Name, shape and fan-in of the parameters."""
        matrix = (num_experts, ffn_dim, model_dim)
        if gated:
            return [
                ("fc1_weight", matrix, model_dim),
                ("fc3_weight", matrix, model_dim),
                ("fc2_weight", matrix, ffn_dim),
            ]
        return [
            ("fc1_weight", matrix, model_dim),
            ("fc1_bias", matrix[:2], model_dim),
            ("fc2_weight", matrix, ffn_dim),
            ("fc2_bias", matrix[::2], ffn_dim),
        ]

    @classmethod
    def num_parameters(
        cls, num_experts: int, model_dim: int, ffn_dim: int, gated: bool = False
    ) -> int:
        """Number of parameters of a stack of these sizes."""
        shapes = cls._shapes(num_experts, model_dim, ffn_dim, gated)
        return sum(math.prod(shape) for _, shape, _ in shapes)

    @staticmethod
    def num_matrices(gated: bool) -> int:
        """Matrices of an expert."""
        return 3 if gated else 2

    def _weights(self) -> dict[str, Tensor]:
        """Matrices and biases by name; frozen elements get a gradient of zero."""
        weights: dict[str, Tensor] = {name: getattr(self, name) for name in self._names}
        for name, weight in weights.items():
            if self.freezes and name.endswith("_weight"):
                weights[name] = weight = weight.view_as(weight)
                if weight.requires_grad:
                    # A weight of zero then stays exactly zero under any optimizer whose moments of
                    # it are zero, since weight decay is a factor.
                    frozen = getattr(self, frozen_name(name))
                    weight.register_hook(partial(Tensor.masked_fill, mask=frozen, value=0.0))
        return weights

    def _grouped(
        self,
        x: Tensor,
        counts: Sequence[int] | Tensor,
        weights: dict[str, Tensor],
        token_ids_N: Tensor | None = None,
        weights_N: Tensor | None = None,
        by_token: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """`grouped_ffn` with the weights of as many experts as there are counts."""
        drops = self.dropout.training or getattr(self.dropout, "apply_during_inference", False)
        return grouped_ffn(
            x,
            weights,
            counts,
            find_activation(self.activation),
            dropout=getattr(self.dropout, "p", 0.0) if drops else 0.0,
            grad_scale=self.grad_scale,
            token_ids_N=token_ids_N,
            weights_N=weights_N,
            by_token=by_token,
        )

    def extra_repr(self) -> str:
        experts, ffn_dim, model_dim = self.fc1_weight.shape
        return f"experts={experts}, model_dim={model_dim}, ffn_dim={ffn_dim}, gated={self.gated}"


class ExpertFFN(ExpertStack):
    """A stack of experts, all of them on this rank."""

    def forward(self, x_TD: Tensor, plan: RoutingPlan) -> Tensor:
        """The weighted sum of each token's expert outputs, [T, D]; zeros without any expert."""
        counts_E = plan.tokens_per_expert_E
        return self.forward_tokens(
            x_TD, plan.token_ids_N, plan.weights_N, counts_E, by_token=plan.by_token
        )

    def forward_first(
        self, x_TD: Tensor, plan: RoutingPlan, first_row: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """As `forward`, of a plan with pairs of expert 0 alone, whose weights are asked for.

        Args:
            x_TD: tokens.
            plan: routing to expert 0.
            first_row: [E, ...] -> [1, ...], with gradient.
        """
        weights = {name: first_row(getattr(self, name)) for name in self._names}
        counts = plan.tokens_per_expert_E[:1]
        return self._grouped(x_TD, counts, weights, plan.token_ids_N, plan.weights_N, plan.by_token)

    def forward_tokens(
        self,
        x_TD: Tensor,
        token_ids_N: Tensor,
        weights_N: Tensor | None,
        counts: Sequence[int] | Tensor,
        by_token: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As `forward`.

        Args:
            x_TD: tokens.
            token_ids_N: the token of each pair; pairs are sorted by expert.
            weights_N: weight of each pair's output; None: 1.
            counts: pairs of each expert, E numbers that sum to N.
            by_token: as `RoutingPlan.by_token`.
        """
        return self._grouped(x_TD, counts, self._weights(), token_ids_N, weights_N, by_token)

    def forward_rows(self, rows_ND: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
        """Apply each expert to its segment of rows: [N, D].

        Args:
            rows_ND: rows sorted by expert.
            counts: rows of each expert, E numbers that sum to N.
        """
        return self._grouped(rows_ND, counts, self._weights())


def frozen_name(weight: str) -> str:
    """Name of the buffer that marks the frozen elements of the matrix `weight`."""
    return weight.removesuffix("_weight") + "_frozen"
