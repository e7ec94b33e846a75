"""The GShard gate: each token goes to its best candidate and a second one."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import flag
from evomoe_plugin.config.values import check_choice
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.gate import Gate
from evomoe_plugin.gates.registry import register_gate
from evomoe_plugin.gates.scorers import ScorerOptions
from evomoe_plugin.gates.topk_common import PriorityOptions, best, normalized, validate_priority
from evomoe_plugin.routing.choice import Choice
from evomoe_plugin.routing.noise import fold, gumbel, uniform

POLICIES = ("sampling", "random", "all")


@dataclass
class GShardOptions(PriorityOptions, ScorerOptions):
    """fairseq's option names."""

    moe_second_expert_policy: str = flag(
        "sampling",
        "the second expert in training: all (the second best), sampling (sampled by probability "
        "from all but the best) or random (the second best, kept with a probability of twice its "
        "weight); evaluation: all",
    )
    moe_normalize_gate_prob_before_dropping: bool = flag(
        False, "normalise the two weights before tokens are dropped instead of after"
    )


@register_gate("gshard")
class GShardGate(Gate[GShardOptions]):
    """y = (p_1 E_1(x) + p_2 E_2(x)) / (p_1 + p_2), with p = softmax(z).

    Expert 1 has the largest p. Expert 2 is the second best of z, or of z + Gumbel noise with the
    policy `sampling`; `random` keeps it with probability min(1, 2 p_2). The weights of what the
    policy and the capacity keep are normalised: a single remaining expert has weight 1. If they are
    normalised before dropping, `random` uses p_2 / (p_1 + p_2) instead of p_2, and a single
    remaining expert keeps its share.

    Under a capacity all first experts have priority over second ones, then position decides or,
    with batch-prioritised routing, p_1. The balance loss counts first experts only.

    Source: GShard (arXiv 2006.16668, algorithm 1) as implemented in fairseq and fairscale. Their
    capacity follows the tokens, 2 ceil(T / E), even where `random` gives fewer pairs; here it
    follows the pairs.
    """

    Options = GShardOptions

    def __init__(self, info: LayerInfo, options: GShardOptions):
        super().__init__(info, options)
        self.policy = options.moe_second_expert_policy
        self.normalize_first = options.moe_normalize_gate_prob_before_dropping
        self.prioritized = options.moe_batch_prioritized_routing

    @classmethod
    def has_fixed_k(cls, options: GShardOptions) -> bool:
        return options.moe_second_expert_policy != "random"

    @classmethod
    def validate(cls, options: GShardOptions, expert_counts: Sequence[int]) -> list[str]:
        check_choice(options, "moe_second_expert_policy", POLICIES)
        if min(expert_counts) + options.moe_null_experts < 2:
            raise OptionError(
                "moe_expert_count",
                options.moe_expert_count,
                "the gate gshard selects two candidates: give at least 2 experts, "
                "or --moe-gate switch",
            )
        if options.moe_normalize_gate_prob_before_dropping:
            cls._validate_normalization(options)
        return validate_priority(options)

    @classmethod
    def _validate_normalization(cls, options: GShardOptions) -> None:
        option = "moe_normalize_gate_prob_before_dropping"
        if options.moe_renormalize_after_drop:
            raise OptionError(
                option,
                True,
                "--moe-renormalize-after-drop normalises again after "
                "dropping: leave one of them out",
            )
        drops = options.moe_second_expert_policy == "random" or (
            options.moe_capacity_factor is not None
            or options.moe_eval_capacity_factor is not None
            or options.moe_eval_capacity_token_fraction != -1
        )
        if not drops:
            raise OptionError(
                option, True, "nothing is dropped: leave it out, or give --moe-capacity-factor"
            )

    @classmethod
    def weights_sum_to_one(cls, options: GShardOptions) -> bool:
        return not (
            options.moe_normalize_gate_prob_before_dropping
            and options.moe_second_expert_policy == "random"
        )

    @classmethod
    def renormalizes_after_drop(cls, options: GShardOptions) -> bool:
        return not options.moe_normalize_gate_prob_before_dropping

    def route(self, x_TD: Tensor, context: GateContext) -> Choice:
        logits_TC = self.score(x_TD, context)
        probs_TC = self.scorer.scores(logits_TC)
        draws = self.training and self.policy in ("sampling", "random")
        keys_T = context.noise_keys_T if draws else None
        ranked_TC = logits_TC.detach()
        first_TC = best(ranked_TC)
        if self.policy == "sampling" and keys_T is not None:
            ranked_TC = ranked_TC + gumbel(keys_T, ranked_TC.size(1)).to(ranked_TC.dtype)
        second_TC = best(ranked_TC.masked_fill(first_TC, float("-inf")))
        weights_TC = normalized(probs_TC, first_TC | second_TC)
        if self.policy == "random" and keys_T is not None:
            share_TC = weights_TC if self.normalize_first else probs_TC
            chance_TC = uniform(fold(keys_T, _SECOND_STREAM), 1).to(probs_TC.dtype)
            second_TC = second_TC & (chance_TC < 2 * share_TC.detach())
        mask_TC = first_TC | second_TC
        if not self.normalize_first:
            weights_TC = normalized(probs_TC, mask_TC)
        # In fp64, so that adding 1 keeps different fp32 probabilities different.
        priority_TC = first_TC.double()
        if self.prioritized:
            priority_TC = priority_TC + probs_TC.detach().amax(1, keepdim=True).double()
        return Choice(
            mask_TC,
            weights_TC,
            probs_TC,
            logits_TC,
            priority_TC=priority_TC,
            balance_mask_TC=first_TC,
            most_pairs=2 * len(x_TD),
        )


_SECOND_STREAM = 0x25EC  # separates these random numbers from those of other uses
