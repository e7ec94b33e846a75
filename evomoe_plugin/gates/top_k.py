"""The top-k gate: each token goes to its k best candidates."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import flag
from evomoe_plugin.config.values import check_choice, check_number
from evomoe_plugin.gates.balance_bias import BalanceBiasOptions, BiasBalancedGate
from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.registry import register_gate
from evomoe_plugin.gates.scorers import SCORERS, ScorerOptions
from evomoe_plugin.gates.topk_common import (
    PriorityOptions,
    TopKCountOptions,
    best,
    validate_priority,
    validate_top_k,
)
from evomoe_plugin.routing.choice import Choice
from evomoe_plugin.routing.noise import gumbel


@dataclass
class TopKOptions(TopKCountOptions, PriorityOptions, BalanceBiasOptions, ScorerOptions):
    """Options of the top-k gate."""

    moe_top_k_weights: str = flag(
        "raw", "weights of the k experts: raw (scores) or renormalized (to sum 1)"
    )
    moe_sample_top_k: int = flag(
        0,
        "in training, so many of the k candidates are sampled by probability from those that are "
        "not among the best others",
    )


@register_gate("top_k")
class TopKGate(BiasBalancedGate[TopKOptions]):
    """y = Σ s_e E_e(x) over the k candidates of largest score s (+ bias).

    s is the softmax of the scorer's logits, or their sigmoid with the scorer `sigmoid`
    (Shazeer et al., arXiv 1701.06538; weights `renormalized` as in Mixtral, arXiv 2401.04088).

    Sampled candidates (Dense2MoE's sample_topk) are drawn without replacement, by Gumbel noise.
    Loss-free balancing (arXiv 2408.15664): b_e += u sign(mean load - load_e) after each update. The
    bias keeps its value when the rate is set to 0.
    """

    Options = TopKOptions
    capabilities = Capabilities(scorers=tuple(SCORERS), fixed_k=True)

    def __init__(self, info: LayerInfo, options: TopKOptions):
        super().__init__(info, options)
        self.top_k = options.moe_top_k
        self.renormalized = options.moe_top_k_weights == "renormalized"
        self.sampled = options.moe_sample_top_k
        self.bias_update_rate = options.moe_bias_update_rate
        self.prioritized = options.moe_batch_prioritized_routing
        self.make_bias()

    @classmethod
    def validate(cls, options: TopKOptions, expert_counts: Sequence[int]) -> list[str]:
        validate_top_k(options, expert_counts)
        check_choice(options, "moe_top_k_weights", ("raw", "renormalized"))
        check_number(
            options,
            "moe_sample_top_k",
            f"[0, {options.moe_top_k}]",
            f"give 0 to --moe-top-k ({options.moe_top_k})",
        )
        check_number(
            options,
            "moe_bias_update_rate",
            "[0, 1]",
            "scores are at most 1: give a number from 0 to 1, such as 0.001",
        )
        if options.moe_sample_top_k and options.moe_bias_update_rate:
            raise OptionError(
                "moe_sample_top_k",
                options.moe_sample_top_k,
                "sampling ignores the bias, which would grow without bound: leave "
                "out this or --moe-bias-update-rate",
            )
        warnings = validate_priority(options)
        if options.moe_top_k_weights == "renormalized" and options.moe_top_k == 1:
            warnings.append(
                "--moe-top-k-weights renormalized: with --moe-top-k 1 the weight is "
                "always 1, so the gate learns from auxiliary losses only"
            )
        return warnings

    @classmethod
    def weights_sum_to_one(cls, options: TopKOptions) -> bool:
        return options.moe_top_k_weights == "renormalized"

    def route(self, x_TD: Tensor, context: GateContext) -> Choice:
        logits_TC = self.score(x_TD, context)
        scores_TC = self.scorer.scores(logits_TC)
        # In fp64: in fp32, sigmoids of different large logits are equal.
        ranked_TC = self.scorer.scores(logits_TC.detach().double()) + self.bias_C
        mask_TC = self._select(ranked_TC, self.scorer.log_scores(logits_TC).detach(), context)
        weights_TC = scores_TC
        if self.renormalized:  # from logarithms, since very small scores are rounded to 0
            selected_TC = self.scorer.log_scores(logits_TC).masked_fill(~mask_TC, float("-inf"))
            weights_TC = torch.softmax(selected_TC, dim=1)
        probs_TC = scores_TC if self.scorer.SUMS_TO_ONE else self.scorer.distribution(logits_TC)
        priority_TC = None
        if self.prioritized:
            priority_TC = scores_TC.amax(1, keepdim=True).expand_as(scores_TC)
        return Choice(
            mask_TC,
            weights_TC,
            probs_TC,
            logits_TC,
            priority_TC=priority_TC,
            most_pairs=len(mask_TC) * self.top_k,
        )

    def _select(self, ranked_TC: Tensor, log_scores_TC: Tensor, context: GateContext) -> Tensor:
        """Selected candidates of each token, bool [T, C]."""
        keys_T = context.noise_keys_T if self.training and self.sampled else None
        if keys_T is None:
            return best(ranked_TC, self.top_k)
        best_TC = best(ranked_TC, self.top_k - self.sampled)
        noise_TC = gumbel(keys_T, ranked_TC.size(1)).to(log_scores_TC.dtype)
        drawn_TC = (log_scores_TC + noise_TC).masked_fill(best_TC, float("-inf"))
        return best_TC | best(drawn_TC, self.sampled)
