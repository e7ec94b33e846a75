"""The smooth step: a sigmoid-like function that reaches 0 and 1."""

from __future__ import annotations

from torch import Tensor


def smooth_step(x: Tensor, width: float) -> Tensor:
    """S(x) = -2 (x/g)^3 + 3/2 x/g + 1/2 for |x| <= g/2, exactly 0 below and exactly 1 above.

    Its derivative is continuous, and 0 from ±g/2 on.

    Args:
        width: g > 0.
    Source: Hazimeh et al., "The tree ensemble layer" (arXiv 2002.07772); DSelect-k (arXiv
    2106.03760, 3.1).
    """
    share = (x / width).clamp(-0.5, 0.5)
    return (1.5 - 2 * share * share) * share + 0.5
