"""The top-p gate: each token goes to the smallest set of candidates with enough probability."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomoe_plugin.config.options import flag
from evomoe_plugin.config.values import check_choice, check_number
from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.gate import Gate
from evomoe_plugin.gates.registry import register_gate
from evomoe_plugin.gates.scorers import ScorerOptions
from evomoe_plugin.gates.topk_common import (
    TopKCountOptions,
    normalized,
    selection_mask,
    validate_top_k,
)
from evomoe_plugin.routing.choice import Choice
from evomoe_plugin.routing.noise import fold, fold_all, gumbel, uniform

WEIGHTS = ("softmax", "uniform", "sparsemixer")
NEAR_TIE = 0.02  # relative gap to the best logit, as in DCMoE: twice its jitter of 0.01


@dataclass
class TopPOptions(TopKCountOptions, ScorerOptions):
    """Options of the top-p gate."""

    moe_top_p: float = flag(
        0.7,
        "a token goes to its most probable candidates until their total probability reaches this; "
        "0: to --moe-top-k candidates",
    )
    moe_top_p_weights: str = flag(
        "softmax",
        "weights of the selected candidates, null experts included, which sum to 1: softmax "
        "(their probabilities), uniform, or sparsemixer (sampled among near ties, with its "
        "gradient estimator)",
    )
    moe_jitter: float = flag(
        0.0,
        "in training the input of the gate is multiplied by uniform noise from 1 - this to 1 + "
        "this",
    )


@register_gate("top_p")
class TopPGate(Gate[TopPOptions]):
    """y = Σ w_e E_e(x) over the smallest set whose probability reaches P, p = softmax(z).

    Null experts are candidates like others, with a share of probability and weight. At least one
    candidate is selected. The weights are p normalised over the set, 1 over its size, or those of
    `sparsemixer`.

    Source: DCMoE (Uni-MoE 2.0, arXiv 2511.12609); dynamic routing by top-p: arXiv 2403.07652.
    """

    Options = TopPOptions
    capabilities = Capabilities(default_aux="switch=1", unit_weights=True)

    def __init__(self, info: LayerInfo, options: TopPOptions):
        super().__init__(info, options)
        self.top_p = options.moe_top_p
        self.top_k = options.moe_top_k
        self.weights = options.moe_top_p_weights
        self.jitter = options.moe_jitter

    @classmethod
    def validate(cls, options: TopPOptions, expert_counts: Sequence[int]) -> list[str]:
        check_number(
            options,
            "moe_top_p",
            "[0, 1]",
            "it is a probability: give a number from 0 to 1; 0 uses --moe-top-k",
        )
        check_choice(options, "moe_top_p_weights", WEIGHTS)
        check_number(
            options, "moe_jitter", "[0, 1)", "give 0 or more and less than 1; 0.01 is usual"
        )
        only = "learns only from auxiliary losses and softmax weights of shared experts"
        warnings = []
        if options.moe_top_p == 0:
            validate_top_k(options, expert_counts)
            if options.moe_top_k == 1:
                warnings.append(
                    "--moe-top-p 0 --moe-top-k 1: the weight of the one selected "
                    f"candidate is 1; the gate {only}"
                )
        elif options.moe_top_k != TopKCountOptions.moe_top_k:
            warnings.append(
                f"--moe-top-k {options.moe_top_k}: --moe-top-p {options.moe_top_p} determines how "
                "many candidates are selected; give --moe-top-p 0 to use --moe-top-k"
            )
        if options.moe_top_p_weights == "uniform":
            warnings.append(f"--moe-top-p-weights uniform: the gate {only}")
        if options.moe_top_p_weights == "sparsemixer":
            warnings.append(
                "--moe-top-p-weights sparsemixer: except for tokens with near ties, "
                f"the gate {only}"
            )
        return warnings

    def route(self, x_TD: Tensor, context: GateContext) -> Choice:
        draws = self.training and (self.jitter or self.weights == "sparsemixer")
        keys_T = context.noise_keys_T if draws else None
        if self.jitter and keys_T is not None:
            noise_TD = uniform(fold(keys_T, _JITTER_STREAM), x_TD.size(1)).to(x_TD.dtype)
            x_TD = x_TD * (1 + self.jitter * (2 * noise_TD - 1))
        logits_TC = self.score(x_TD, context)
        probs_TC = self.scorer.scores(logits_TC)
        order_TC = logits_TC.detach().argsort(dim=1, descending=True, stable=True)
        count_T1 = self._num_selected(probs_TC.detach().gather(1, order_TC))
        if self.weights == "sparsemixer":
            mask_TC, values_TC = sparsemixer(logits_TC, count_T1, keys_T)
        else:
            rank_C = torch.arange(logits_TC.size(1), device=logits_TC.device)
            mask_TC = torch.zeros_like(logits_TC, dtype=torch.bool).scatter_(
                1, order_TC, rank_C < count_T1
            )
            values_TC = probs_TC if self.weights == "softmax" else torch.ones_like(probs_TC)
        return Choice(mask_TC, normalized(values_TC, mask_TC), probs_TC, logits_TC)

    def _num_selected(self, sorted_TC: Tensor) -> Tensor:
        """Number of candidates of each token, int64 [T, 1], from its sorted probabilities."""
        candidates = sorted_TC.size(1)
        if self.top_p == 0 or self.top_p >= 1:  # a partial sum may round to 1
            fixed = candidates if self.top_p else self.top_k
            return torch.full_like(sorted_TC[:, :1], fixed, dtype=torch.int64)
        # Without the last sum, which is 1 up to rounding.
        return 1 + (sorted_TC.cumsum(1)[:, :-1] < self.top_p).sum(1, keepdim=True)


def sparsemixer(
    logits_TC: Tensor, count_T1: Tensor, keys_T: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Select candidates one after the other, each among near ties of the best remaining one.

    In round r, N are the remaining candidates whose logit z is within `NEAR_TIE` of the largest
    remaining one, (max - z) / max(|max|, |z|), and q = softmax of z over N. In training, e is
    sampled by q. Its value is c q_e, where c = 1 if z_e is the largest remaining logit, else 1 with
    probability 1/4 and 1/3 otherwise (Heun's third-order method). The gradient is that of q_e,
    without c: q_e (1[j = e] - q_j). Without keys, e is the best remaining one and c = 1.

    Source: SparseMixer (arXiv 2310.00811) and GRIN (arXiv 2409.12136), as in Uni-MoE.

    Args:
        count_T1: number of candidates of each token, int64.
        keys_T: noise keys; None: no randomness.
    Returns:
        the selection, bool [T, C], and the values, not normalised, [T, C].
    """
    bare_TC = logits_TC.detach()
    columns = bare_TC.size(1)
    left_TC = torch.ones_like(bare_TC, dtype=torch.bool)
    mask_TC = torch.zeros_like(left_TC)
    values_TC = torch.zeros_like(logits_TC)
    for r in range(int(count_T1.max()) if count_T1.numel() else 0):
        largest_T1 = bare_TC.masked_fill(~left_TC, float("-inf")).amax(1, keepdim=True)
        scale_TC = torch.maximum(largest_T1.abs(), bare_TC.abs())
        near_TC = left_TC & (largest_T1 - bare_TC <= NEAR_TIE * scale_TC)
        ranked_TC = bare_TC
        if keys_T is not None:
            noise_TC = gumbel(fold_all(keys_T, _SELECTION_STREAM, r), columns)
            ranked_TC = bare_TC + noise_TC.to(bare_TC.dtype)
        selected_T1 = ranked_TC.masked_fill(~near_TC, float("-inf")).argmax(1, keepdim=True)
        value_T1 = torch.softmax(logits_TC.masked_fill(~near_TC, float("-inf")), dim=1).gather(
            1, selected_T1
        )
        if keys_T is not None:
            chance_T1 = uniform(fold_all(keys_T, _SCALE_STREAM, r), 1)
            whole_T1 = (bare_TC.gather(1, selected_T1) == largest_T1) | (chance_T1 > 0.75)
            scaled_T1 = torch.where(whole_T1, value_T1, value_T1 / 3).detach()
            value_T1 = value_T1 + (scaled_T1 - value_T1.detach())
        selected_TC = selection_mask(selected_T1, columns)
        left_TC = left_TC & ~selected_TC
        selected_TC = selected_TC & (r < count_T1)
        mask_TC = mask_TC | selected_TC
        values_TC = torch.where(selected_TC, value_T1, values_TC)
    return mask_TC, values_TC


# Separate the random numbers of these uses.
_JITTER_STREAM, _SELECTION_STREAM, _SCALE_STREAM = 0x717E, 0x91C4, 0x5CA1
