"""The scale of the combine weights (`--moe-weight-scale`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evomoe_plugin.gates.fp64_buffers import fp64_buffer, register_fp64_buffer

WEIGHT_SCALES = ("none", "unit", "mean", "learned")
MEAN_DECAY = 0.99
"""Per update, of the running mean of `mean`."""


class WeightScale(nn.Module):
    """Scales the weights w of a token's selected candidates A.

    - `unit`: w / sg(Σ_A w), sg without gradient: a token's weights sum to 1, a single pick has
      weight 1, and the gate keeps the gradient of w up to that scale (straight-through). As the
      number of selected candidates falls, the scale of the output does not change.
    - `mean`: w / m, with m the running mean over updates of the tokens' Σ_A w: their mean becomes
      1, and their differences remain. 1 until the first update is done.
    - `learned`: w_c a_c, with a learned gain a of each candidate, 1 at the start.
    """

    def __init__(self, kind: str, num_candidates: int):
        super().__init__()
        self.kind = kind
        self.gain: nn.Parameter | None = None
        if kind == "learned":
            self.gain = nn.Parameter(torch.ones(num_candidates))
        if kind == "mean":
            register_fp64_buffer(self, "mean", torch.ones(()))

    @property
    def mean(self) -> Tensor:
        """m, a scalar in fp64; a view. Of `mean` only."""
        return fp64_buffer(self, "mean")

    def forward(self, weights_TC: Tensor, mask_TC: Tensor) -> Tensor:
        if self.gain is not None:
            return weights_TC * self.gain.to(weights_TC.dtype)
        if self.kind == "mean":
            return weights_TC / self.mean.to(weights_TC.dtype)
        total_T1 = total_weights(weights_TC, mask_TC).unsqueeze(1)
        return weights_TC / torch.where(total_T1 > 0, total_T1, 1.0)

    def update(self, num_updates: int, total: Tensor, num_tokens: Tensor) -> None:
        """Change m by the weights of an update, before scaling, summed over tokens.

        Args:
            num_updates: completed updates with the gate, this one included.
        """
        if num_tokens > 0 and total > 0:
            decay = MEAN_DECAY if num_updates > 1 else 0.0
            self.mean.mul_(decay).add_(total / num_tokens, alpha=1 - decay)


def total_weights(weights_TC: Tensor, mask_TC: Tensor) -> Tensor:
    """Sum of the weights of each token's selected candidates, [T], without gradient."""
    return weights_TC.detach().masked_fill(~mask_TC, 0.0).sum(1)
