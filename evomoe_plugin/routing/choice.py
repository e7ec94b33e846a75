"""The choice of a gate, token by candidate, before it becomes a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """The output of a gate for T tokens and C candidates: E routed experts, then the null experts.

    This is all that a gate has to compute. Padding, the plan, auxiliary losses, statistics,
    capacity and the weights of shared experts follow from it in the same way for every gate.
    """

    mask_TC: Tensor
    """bool: the candidates each token goes to."""
    weights_TC: Tensor
    """Combine weights of the experts' outputs, with gradient; ignored outside the mask."""
    probs_TC: Tensor
    """Probabilities of the candidates, for losses and statistics."""
    logits_TC: Tensor | None = None
    """Logits of `probs_TC`, without noise; None if the gate has none."""
    priority_TC: Tensor | None = None
    """Under a capacity with the policy `position`, larger values are kept first and position
    decides ties; None: position only."""
    balance_mask_TC: Tensor | None = None
    """bool: the load in the balance loss; None: `mask_TC`."""
    balance_probs_TC: Tensor | None = None
    """The importance in the balance loss; None: `probs_TC`."""
    most_pairs: int | None = None
    """How many pairs `mask_TC` has at most, if that is known without a look at it, for which the
    host would wait for a GPU; None: unknown."""
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    """Unweighted losses of this gate (`Capabilities.losses`)."""
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    """Sums of this gate (`Gate.zero_stats`)."""
