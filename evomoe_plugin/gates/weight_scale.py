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
    - `mean`: w / m, with m the running mean over updates of Σ_A w of the tokens that selected a
      candidate: their mean becomes 1, their differences remain. The first mean is taken as it is;
      until then m is 1.
    - `learned`: w_c a_c, with a learned gain a of each candidate, 1 at the start.
    """

    def __init__(self, kind: str, num_candidates: int):
        super().__init__()
        self.kind = kind
        self.gain: nn.Parameter | None = None
        if kind == "learned":
            self.gain = nn.Parameter(torch.ones(num_candidates))
        if kind == "mean":
            register_fp64_buffer(self, "mean", torch.zeros(()))  # 0: none yet

    @property
    def mean(self) -> Tensor:
        """m, a scalar in fp64. Of `mean` only."""
        value = fp64_buffer(self, "mean")
        return torch.where(value > 0, value, 1.0)

    def forward(self, weights_TC: Tensor, mask_TC: Tensor) -> Tensor:
        if self.gain is not None:
            return weights_TC * self.gain.to(weights_TC.dtype)
        if self.kind == "mean":
            return weights_TC / self.mean.to(weights_TC.dtype)
        total_T1 = weights_TC.detach().masked_fill(~mask_TC, 0.0).sum(1, keepdim=True)
        return weights_TC / torch.where(total_T1 > 0, total_T1, 1.0)

    def update(self, total: Tensor, num_tokens: Tensor) -> None:
        """Change m by an update's sums, as `sum_of_weights` gives them."""
        if num_tokens > 0 and total > 0:
            mean = fp64_buffer(self, "mean")
            decay = MEAN_DECAY if mean > 0 else 0.0
            mean.mul_(decay).add_(total / num_tokens, alpha=1 - decay)


def sum_of_weights(weights_TC: Tensor, mask_TC: Tensor) -> Tensor:
    """Sum of the weights of selected candidates, and number of tokens that have one, fp64 [2]."""
    total = weights_TC.detach().masked_fill(~mask_TC, 0.0).sum(dtype=torch.float64)
    return torch.stack([total, mask_TC.any(1).sum().double()])
