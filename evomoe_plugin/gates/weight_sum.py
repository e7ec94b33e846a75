"""What a gate says of the weights that it gives a token's experts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightSum:
    """What a token's weights sum to over the routed experts, in evaluation before the first update.

    Where it is 1, experts that are copies of one network give what that network gives: `evomoe
    upcycle` tells users by this whether logits stay equal.
    """

    is_one: bool | None
    """None: of some tokens, or it is not known."""
    why: str
    """In a few words, for users."""
    all_equal: bool = False
    """Whether every expert works on every token, all with one weight."""
