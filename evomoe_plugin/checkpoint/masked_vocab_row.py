"""An output embedding whose logit is low after every input: masks an unused vocabulary row.

Without an output bias the row e has the logit h·e, where h = γ ⊙ x̂ + β is the output of the last
LayerNorm; x̂ has mean 0 and norm at most √D. A row of zeros has the logit 0, which may be the
largest. But some directions have the same dot product with every h: for 1/γ it is Σ β/γ, since x̂
sums to 0; and where γ is 0, h is β. A multiple of such a direction has a constant logit, as low as
wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

# In nats: at least so far below the mean logit of the other rows.
MARGIN = 20.0


def masked_vocab_row(
    weight_D: Tensor, bias_D: Tensor, mean_D: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """A row [D] whose probability beside V others is always below exp(-MARGIN) / V.

    Its logit is the lowest possible one of the mean row, less the margin; the largest logit is
    never below the mean's.

    Args:
        weight_D: γ of the last LayerNorm.
        bias_D: β.
        mean_D: the mean of the other rows, fp64.
        dtype: of the row.
    Returns:
        None if there is no such row: Σ β/γ is (nearly) 0, as in an untrained model, or the dtype
        is too coarse.
    """
    gamma_D, beta_D = weight_D.double(), bias_D.double()
    spread_D = gamma_D * mean_D
    lowest = beta_D @ mean_D - gamma_D.numel() ** 0.5 * (spread_D - spread_D.mean()).norm()
    logit = min(float(lowest), 0.0) - MARGIN
    is_fixed_D = gamma_D == 0
    direction_D = torch.where(is_fixed_D, beta_D, 0.0) if is_fixed_D.any() else 1 / gamma_D
    constant = direction_D @ beta_D
    row_D = (direction_D * (logit / constant)).to(dtype)
    # Bound of the rounding of h · row; infinite or NaN where the constant is 0.
    terms_D = row_D.double().abs() * (gamma_D.abs() + beta_D.abs())
    rounding = torch.finfo(dtype).eps * float(terms_D.sum())
    return row_D if rounding < MARGIN / 4 else None
