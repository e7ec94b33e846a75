"""The expert-choice gate: each expert selects its best tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import flag, is_causal
from evomoe_plugin.config.values import check_number
from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.gate import Gate
from evomoe_plugin.gates.registry import register_gate
from evomoe_plugin.gates.scorers import ScorerOptions
from evomoe_plugin.gates.topk_common import best
from evomoe_plugin.routing.choice import Choice


@dataclass
class ExpertChoiceOptions(ScorerOptions):
    """Options of the expert-choice gate."""

    moe_expert_choice_factor: float = flag(
        2.0,
        "mean number of experts per token: an expert selects ceil(factor * tokens / experts) "
        "tokens",
    )
    moe_allow_noncausal: bool = flag(
        False, "allow training with a gate in which a token's output depends on later tokens"
    )


@register_gate("expert_choice")
class ExpertChoiceGate(Gate[ExpertChoiceOptions]):
    """Each expert selects the C tokens of largest p_e, C = ceil(factor T / E), p = softmax(z).

    y = Σ p_e E_e(x) over the experts that selected the token, possibly none. Padding is neither
    counted in T nor selected. Source: expert choice (arXiv 2202.09368).

    Whether an expert selects a token depends on all tokens of the batch, later ones included, which
    a causal model must not. Evaluation therefore routes each token to its k experts with the
    largest p, k being the rounded factor.
    """

    Options = ExpertChoiceOptions
    capabilities = Capabilities(
        default_aux="none", null_experts=False, capacity=False, keeps_copies_equal=True
    )

    def __init__(self, info: LayerInfo, options: ExpertChoiceOptions):
        super().__init__(info, options)
        self.factor = options.moe_expert_choice_factor
        self.top_k = min(_eval_top_k(options), info.num_experts)

    @classmethod
    def validate(cls, options: ExpertChoiceOptions, expert_counts: Sequence[int]) -> list[str]:
        experts = min(expert_counts)
        check_number(
            options,
            "moe_expert_choice_factor",
            f"(0, {experts}]",
            f"an MoE layer has {experts} experts, each of which selects a "
            "token at most once: give a number above 0 and at most that, or a "
            "larger --moe-expert-count",
        )
        if is_causal(options) and not options.moe_allow_noncausal:
            raise OptionError(
                "moe_gate",
                "expert_choice",
                "experts choose among all tokens of a batch, so outputs depend on "
                "later tokens, which a causal model must not: use top_k, or give "
                "--moe-allow-noncausal to train anyway",
            )
        not_causal = (
            "--moe-gate expert_choice: training is not causal, and evaluation routes each token to "
            "its best experts instead: perplexity is worse than the training loss suggests"
        )
        return [
            *([not_causal] if is_causal(options) else []),
            *(
                f"--moe-aux {name}: every expert gets the same number of tokens with the gate "
                "expert_choice, so this loss is constant"
                for name in cls.aux_coefficients(options)
                if name in ("balance", "switch")
            ),
        ]

    def route(self, x_TD: Tensor, context: GateContext) -> Choice:
        logits_TE = self.score(x_TD, context)
        probs_TE = self.scorer.scores(logits_TE)
        T, E = probs_TE.shape
        if self.training:
            mask_TE = self._selected(probs_TE.detach(), context)
            most_pairs = E * min(math.ceil(self.factor * T / E), T)
        else:
            mask_TE = best(logits_TE, self.top_k)
            most_pairs = T * self.top_k
        return Choice(mask_TE, probs_TE, probs_TE, logits_TE, most_pairs=most_pairs)

    def _selected(self, probs_TE: Tensor, context: GateContext) -> Tensor:
        """bool [T, E]: the tokens that each expert selects; earlier ones on ties."""
        tokens = context.num_tokens(probs_TE)
        capacity = torch.minimum((self.factor * tokens / probs_TE.size(1)).ceil(), tokens)
        if context.token_mask_T is not None:
            probs_TE = probs_TE.masked_fill(~context.token_mask_T.unsqueeze(1), -1.0)
        order_TE = probs_TE.argsort(dim=0, descending=True, stable=True)
        place_T1 = torch.arange(probs_TE.size(0), device=probs_TE.device).unsqueeze(1)
        return torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(
            0, order_TE, (place_T1 < capacity).expand_as(order_TE)
        )


def _eval_top_k(options: ExpertChoiceOptions) -> int:
    """Experts per token in evaluation, not limited by the number of experts."""
    return max(int(options.moe_expert_choice_factor + 0.5), 1)
