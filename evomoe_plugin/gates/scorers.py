"""Scorers: from tokens to a logit for each candidate. A gate selects by the logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import flag
from evomoe_plugin.config.values import check_number
from evomoe_plugin.gates.logit_options import LogitOptions, validate_logits


@dataclass
class ScorerOptions(LogitOptions):
    """For gates that take any scorer."""

    moe_scorer: str = flag(
        "linear",
        "how a gate scores experts: linear; mlp (one hidden layer); gmm (cosine similarity to the "
        "experts' centres after a projection); cosine (without a projection); sigmoid (linear, "
        "with a sigmoid instead of a softmax; top_k only)",
    )
    moe_scorer_dim: int = flag(256, "hidden width of the scorers mlp and gmm")
    moe_scorer_dropout: float = flag(0.0, "dropout in the hidden layer of the scorer mlp")


class Scorer(nn.Module):
    """Logits of C candidates. The parameters are cast to the dtype of the tokens."""

    HAS_VECTORS: ClassVar[bool] = True
    """Whether each candidate has a vector, as the losses `diversity` and `simplicity` need."""
    SUMS_TO_ONE: ClassVar[bool] = True
    """Whether the scores of a token sum to 1, that is, are its distribution."""

    def forward(self, x_TD: Tensor) -> Tensor:
        """Logits [T, C]."""
        raise NotImplementedError

    def scores(self, logits_TC: Tensor) -> Tensor:
        """What candidates are selected and weighted by: the softmax of the logits."""
        return torch.softmax(logits_TC, dim=1)

    def log_scores(self, logits_TC: Tensor) -> Tensor:
        """Logarithms of the scores up to a constant per row; finite for finite logits."""
        return logits_TC

    def distribution(self, logits_TC: Tensor) -> Tensor:
        """The scores, scaled to sum 1."""
        return torch.softmax(self.log_scores(logits_TC), dim=1)

    def vectors(self) -> Tensor:
        """The candidates' vectors, [C, any]."""
        raise NotImplementedError


def _uniform(*shape: int, fan_in: int) -> nn.Parameter:
    """The bounds of nn.Linear."""
    return nn.Parameter(torch.empty(*shape).uniform_(-(fan_in**-0.5), fan_in**-0.5))


class LinearScorer(Scorer):
    """z = W x, without bias."""

    def __init__(self, model_dim: int, num_candidates: int, options: ScorerOptions | None = None):
        super().__init__()
        self.weight = _uniform(num_candidates, model_dim, fan_in=model_dim)

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight.to(x_TD.dtype))

    def vectors(self) -> Tensor:
        return self.weight


class SigmoidScorer(LinearScorer):
    """z = W x, and the score of each expert is sigmoid(z) (DeepSeek-V3, arXiv 2412.19437)."""

    SUMS_TO_ONE = False

    def scores(self, logits_TC: Tensor) -> Tensor:
        return torch.sigmoid(logits_TC)

    def log_scores(self, logits_TC: Tensor) -> Tensor:
        return F.logsigmoid(logits_TC)


class MLPScorer(Scorer):
    """z = W2 dropout(GELU(W1 x + b1)) (Dense2MoE's `mlp`)."""

    HAS_VECTORS = False

    def __init__(self, model_dim: int, num_candidates: int, options: ScorerOptions):
        super().__init__()
        hidden = options.moe_scorer_dim
        self.hidden_weight = _uniform(hidden, model_dim, fan_in=model_dim)
        self.hidden_bias = _uniform(hidden, fan_in=model_dim)
        self.weight = _uniform(num_candidates, hidden, fan_in=hidden)
        self.dropout = options.moe_scorer_dropout

    def forward(self, x_TD: Tensor) -> Tensor:
        dtype = x_TD.dtype
        hidden = F.gelu(F.linear(x_TD, self.hidden_weight.to(dtype), self.hidden_bias.to(dtype)))
        hidden = F.dropout(hidden, self.dropout, self.training)
        return F.linear(hidden, self.weight.to(dtype))


class CosineScorer(Scorer):
    """z_e = exp(s) cos(x, c_e), with a learned scale s of at most ln 100.

    Source: X-MoE (arXiv 2204.09179) for the cosine, CLIP for the bound.
    """

    def __init__(self, model_dim: int, num_candidates: int, options: ScorerOptions):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(num_candidates, model_dim))
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self, x_TD: Tensor) -> Tensor:
        centres_CD = F.normalize(self.centres.to(x_TD.dtype), dim=1)
        scale = self.log_scale.to(x_TD.dtype).clamp(max=math.log(100)).exp()
        return scale * F.linear(F.normalize(x_TD, dim=1), centres_CD)

    def vectors(self) -> Tensor:
        return self.centres


class GMMScorer(CosineScorer):
    """The cosine scorer after a projection (Dense2MoE's `gmm`)."""

    def __init__(self, model_dim: int, num_candidates: int, options: ScorerOptions):
        super().__init__(options.moe_scorer_dim, num_candidates, options)
        self.projection = _uniform(options.moe_scorer_dim, model_dim, fan_in=model_dim)

    def forward(self, x_TD: Tensor) -> Tensor:
        return super().forward(F.linear(x_TD, self.projection.to(x_TD.dtype)))


SCORERS: dict[str, type[Scorer]] = {
    "linear": LinearScorer,
    "mlp": MLPScorer,
    "gmm": GMMScorer,
    "cosine": CosineScorer,
    "sigmoid": SigmoidScorer,
}
SOFTMAX_SCORERS = ("linear", "mlp", "gmm", "cosine")


def validate_scorer(options: ScorerOptions, allowed: Sequence[str]) -> list[str]:
    """Warnings; raises `OptionError` unless the scorer is one of `allowed`, with options it can
    use."""
    scorer = options.moe_scorer
    if scorer not in allowed:
        known = "; unknown scorer" if scorer not in SCORERS else ""
        raise OptionError(
            "moe_scorer",
            scorer,
            f"with --moe-gate {options.moe_gate} one of: {', '.join(allowed)}{known}",
        )
    check_number(options, "moe_scorer_dim", "[1, inf)", "give a width of at least 1")
    check_number(options, "moe_scorer_dropout", "[0, 1)", "give 0 or more and less than 1")
    if scorer not in ("mlp", "gmm") and options.moe_scorer_dim != ScorerOptions.moe_scorer_dim:
        raise OptionError(
            "moe_scorer_dim",
            options.moe_scorer_dim,
            f"the scorer {scorer} has no hidden width: leave it out, or "
            "give --moe-scorer mlp or gmm",
        )
    if options.moe_scorer_dropout and scorer != "mlp":
        raise OptionError(
            "moe_scorer_dropout",
            options.moe_scorer_dropout,
            f"the scorer {scorer} has no hidden layer: leave it out, or give --moe-scorer mlp",
        )
    return validate_logits(options, scorer)
