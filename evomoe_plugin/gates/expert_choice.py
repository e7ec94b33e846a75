"""The expert-choice gate: each expert takes its best tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import check_number
from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.gates.gate import Gate, GateContext, LayerInfo, register_gate
from evomoe_plugin.gates.scorers import ScorerOptions
from evomoe_plugin.gates.weight_sum import WeightSum
from evomoe_plugin.routing.choice import Choice


@dataclass
class ExpertChoiceOptions(ScorerOptions):
    """Options of the expert-choice gate."""

    moe_expert_choice_factor: float = field(
        default=2.0,
        metadata={"help": "experts that a token gets on average: an expert takes ceil(factor * "
                          "tokens / experts) tokens"},
    )
    moe_allow_noncausal: bool = field(
        default=False,
        metadata={"help": "let training use a gate in which tokens depend on later ones"},
    )


@register_gate("expert_choice")
class ExpertChoiceGate(Gate[ExpertChoiceOptions]):
    """Each expert takes the C tokens of largest p_e, C = ceil(factor T / E), p = softmax(z).

    y = Σ p_e E_e(x) over the experts that took the token; it may be none. T counts no padding, and
    an expert never takes padding. Source: expert choice (arXiv 2202.09368).

    Whether an expert takes a token depends on all tokens of the batch, later ones too: nothing for
    a causal model. Evaluation therefore lets each token go to its k experts of largest p, k the
    factor rounded.
    """

    Options = ExpertChoiceOptions
    capabilities = Capabilities(default_aux="none", null_experts=False, capacity=False,
                                keeps_copies_equal=True)

    def __init__(self, info: LayerInfo, options: ExpertChoiceOptions):
        super().__init__(info, options)
        self.factor = options.moe_expert_choice_factor
        self.top_k = min(_picks_in_evaluation(options), info.num_experts)

    @classmethod
    def validate(cls, options: ExpertChoiceOptions, expert_counts: Sequence[int]) -> list[str]:
        experts = min(expert_counts)
        check_number(options, "moe_expert_choice_factor", above=0, most=experts,
                     remedy=f"an MoE layer has {experts} experts, and none takes a token twice: "
                            "give a number above 0 and at most that, or a larger "
                            "--moe-expert-count")
        if not options.moe_allow_noncausal:
            raise OptionError("moe_gate", "expert_choice",
                              "experts choose among all tokens of a batch, so that tokens depend "
                              "on later ones, which a causal model must not: take top_k, or give "
                              "--moe-allow-noncausal to train it nonetheless")
        return [
            "--moe-gate expert_choice: training is not causal, and evaluation routes each token to "
            "its best experts instead: perplexity is worse than the training loss suggests",
            *(f"--moe-aux {name}: every expert gets the same number of tokens with the gate "
              "expert_choice, so this loss is constant"
              for name in cls.aux_coefficients(options) if name in ("balance", "switch"))]

    @classmethod
    def weight_sum(cls, options: ExpertChoiceOptions, expert_counts: Sequence[int],
                   zero_logits: bool = False) -> WeightSum:
        if _picks_in_evaluation(options) >= max(expert_counts):
            return WeightSum(True, "all experts work, and their weights sum to 1")
        return WeightSum(False, "a token's weights are probabilities that sum to less than 1")

    def route(self, x_TD: Tensor, context: GateContext) -> Choice:
        logits_TE = self.score(x_TD)
        probs_TE = self.scorer.scores(logits_TE)
        if self.training:
            mask_TE = self._taken(probs_TE.detach(), context)
        else:
            mask_TE = torch.zeros_like(probs_TE, dtype=torch.bool)
            mask_TE.scatter_(1, logits_TE.topk(self.top_k, dim=1).indices, True)
        return Choice(
            mask_TC=mask_TE,
            weights_TC=probs_TE,
            probs_TC=probs_TE,
            logits_TC=logits_TE,
        )

    def _taken(self, probs_TE: Tensor, context: GateContext) -> Tensor:
        """bool [T, E]: the tokens that each expert takes; the earlier one of equals."""
        tokens = context.num_tokens(probs_TE)
        capacity = torch.minimum((self.factor * tokens / probs_TE.size(1)).ceil(), tokens)
        if context.token_mask_T is not None:
            probs_TE = probs_TE.masked_fill(~context.token_mask_T.unsqueeze(1), -1.0)
        order_TE = probs_TE.argsort(dim=0, descending=True, stable=True)
        place_T1 = torch.arange(probs_TE.size(0), device=probs_TE.device).unsqueeze(1)
        return torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(
            0, order_TE, (place_T1 < capacity).expand_as(order_TE))


def _picks_in_evaluation(options: ExpertChoiceOptions) -> int:
    """Experts that each token is given, of as many as there are."""
    return max(int(options.moe_expert_choice_factor + 0.5), 1)
