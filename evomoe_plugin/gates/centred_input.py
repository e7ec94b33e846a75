"""The gate's input less its running mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evomoe_plugin.gates.fp64_buffers import fp64_buffer, register_fp64_buffer


class CentredInput(nn.Module):
    """x - m, with m <- a m + (1 - a) mean x after each update: m knows earlier updates only.

    The mean is over the tokens of all ranks and micro-batches. The first one is taken as it is;
    until then m is 0.
    """

    def __init__(self, model_dim: int, decay: float):
        super().__init__()
        self.decay = decay
        register_fp64_buffer(self, "mean_D", torch.zeros(model_dim))

    @property
    def mean_D(self) -> Tensor:
        """m, fp64; a view."""
        return fp64_buffer(self, "mean_D")

    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD - self.mean_D.to(x_TD.dtype)

    def sum_of(self, x_TD: Tensor, token_mask_T: Tensor | None) -> Tensor:
        """Sum of the inputs over tokens that are not padding, fp64 [D]."""
        if token_mask_T is not None:
            x_TD = x_TD.masked_fill(~token_mask_T.unsqueeze(1), 0.0)
        return x_TD.detach().sum(0, dtype=torch.float64)

    def update(self, sum_D: Tensor, num_tokens: Tensor) -> None:
        """Change m by the inputs of an update.

        Args:
            sum_D: of the inputs.
            num_tokens: their number, a scalar; 0: no change.
        """
        mean_D = self.mean_D
        share = torch.where(mean_D.any(), mean_D.new_full((), 1 - self.decay), 1.0)
        share = torch.where(num_tokens > 0, share, 0.0)
        mean_D.lerp_((sum_D / num_tokens.clamp(min=1)).to(mean_D.dtype), share)
