"""What a gate chose, token by candidate, before it becomes a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """A gate's answer for T tokens and C candidates: E routed experts, then the null experts.

    This is all that a gate has to work out. Padding, the plan, auxiliary losses, statistics,
    capacity and the weights of shared experts follow from it, for every gate alike.
    """

    mask_TC: Tensor
    """bool: the candidates each token goes to."""
    weights_TC: Tensor
    """What an expert's output is multiplied by, with gradient; ignored outside the mask."""
    probs_TC: Tensor
    """How much the gate wanted each candidate; what losses and statistics are made of."""
    logits_TC: Tensor | None = None
    """What `probs_TC` was computed from, without noise; None for a gate that has none."""
    priority_TC: Tensor | None = None
    """Under a capacity with the policy `position`, larger goes first and position decides ties;
    None: position alone."""
    balance_mask_TC: Tensor | None = None
    """bool: what counts as load in the balance loss; None: `mask_TC`."""
    balance_probs_TC: Tensor | None = None
    """What counts as importance in the balance loss; None: `probs_TC`."""
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    """Unweighted losses that only this gate knows (its `LOSSES`)."""
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    """Sums that only this gate knows (its `zero_stats`)."""
