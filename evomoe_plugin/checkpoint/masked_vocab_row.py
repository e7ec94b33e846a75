"""A row of an output embedding that is never likely, whatever the model reads.

A language model without an output bias gives a row e the logit h·e, where h = γ ⊙ x̂ + β is what its
last LayerNorm gives: x̂ has mean 0 and a length of at most √D. A row of zeros has the logit 0, which
may be the largest of all. But some directions have one product with every h: 1/γ has Σ β/γ, since x̂
sums to 0; and where γ is 0, h is β. A multiple of such a direction has one logit everywhere, as low
as is wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

# By so much, in nats, such a row lies below the mean logit of the others, at the least.
MARGIN = 20.0


def unlikely_row(weight_D: Tensor, bias_D: Tensor, output_VD: Tensor) -> Tensor | None:
    """A row [D] in fp32 whose probability beside `output_VD` is below exp(-MARGIN) / V, always.

    Its logit is that of the mean row where that is lowest, less the margin; the largest logit is
    nowhere below the mean.

    Args:
        weight_D: γ of the last LayerNorm.
        bias_D: β.
        output_VD: the rows of the other symbols.
    Returns:
        None if there is no such row: Σ β/γ is (nearly) 0, as in a model that is not trained.
    """
    gamma_D, beta_D = weight_D.double(), bias_D.double()
    mean_D = output_VD.double().mean(0)
    spread_D = gamma_D * mean_D
    lowest = beta_D @ mean_D - gamma_D.numel() ** 0.5 * (spread_D - spread_D.mean()).norm()
    logit = min(float(lowest), 0.0) - MARGIN
    is_fixed_D = gamma_D == 0
    direction_D = torch.where(is_fixed_D, beta_D, 0.0) if is_fixed_D.any() else 1 / gamma_D
    product = direction_D @ beta_D
    row_D = (direction_D * (logit / product)).float()
    # What rounding in fp32 can add to h · row; infinite or NaN where the product is 0.
    terms_D = row_D.double().abs() * (gamma_D.abs() + beta_D.abs())
    rounding = torch.finfo(torch.float32).eps * float(terms_D.sum())
    return row_D if rounding < MARGIN / 4 else None
