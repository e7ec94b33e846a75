"""The top-k gate: each token goes to its k best candidates."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evomoe_plugin.gates.base import Gate, GateContext, LayerInfo, register_gate
from evomoe_plugin.gates.scorers import SCORERS, ScorerOptions
from evomoe_plugin.options import OptionError, check_choice, check_number
from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.choice import Choice
from evomoe_plugin.routing.noise import gumbel


@dataclass
class PicksOptions:
    """For gates with a number of picks."""

    moe_top_k: int = field(default=2, metadata={"help": "candidates that a token goes to"})


@dataclass
class PriorityOptions:
    """For gates that can let the surest tokens go first."""

    moe_batch_prioritized_routing: bool = field(
        default=False,
        metadata={"help": "under a capacity, tokens with the largest top score go first"},
    )


@dataclass
class TopKOptions(PicksOptions, PriorityOptions, ScorerOptions):
    """Options of the top-k gate."""

    moe_top_k_weights: str = field(
        default="raw",
        metadata={"help": "weights of the picks: raw (their scores) or renormalized (to sum 1)"},
    )
    moe_sample_top_k: int = field(
        default=0,
        metadata={"help": "in training so many of the k picks are drawn by their probability from "
                          "what the best ones leave"},
    )
    moe_bias_update_rate: float = field(
        default=0.0,
        metadata={"help": "loss-free balancing: after each update every expert's bias, added to "
                          "its score in choosing only, moves by this towards an even load"},
    )


def validate_picks(options: Any, expert_counts: Sequence[int]) -> None:
    """Raise `OptionError` unless every layer has as many candidates as picks."""
    check_number(options, "moe_top_k", least=1, remedy="give 1 or more")
    candidates = min(expert_counts) + options.moe_null_experts
    if options.moe_top_k > candidates:
        raise OptionError("moe_top_k", options.moe_top_k,
                          f"an MoE layer has {candidates} candidates: give at most that, or a "
                          "larger --moe-expert-count")


def validate_priority(options: Any) -> Iterator[str]:
    """Yield warnings; raise `OptionError` where batch-prioritised routing has nothing to order."""
    if not options.moe_batch_prioritized_routing:
        return
    if options.moe_capacity_factor is None:
        raise OptionError("moe_batch_prioritized_routing", True,
                          "no expert has a capacity in training: leave it out, or give "
                          "--moe-capacity-factor")
    if options.moe_drop_policy not in (None, "position"):
        raise OptionError("moe_drop_policy", options.moe_drop_policy,
                          "--moe-batch-prioritized-routing says who goes first: leave one of "
                          "them out")
    yield ("--moe-batch-prioritized-routing: in training, later tokens can push out earlier "
           "ones, which is not causal; evaluation has no capacity by default")


@register_gate("top_k")
class TopKGate(Gate):
    """y = Σ s_e E_e(x) over the k candidates of largest score s (+ bias).

    s is the softmax of the scorer's logits, or their sigmoid with the scorer `sigmoid`
    (Shazeer et al., arXiv 1701.06538; weights `renormalized` as Mixtral, arXiv 2401.04088).

    Sampled picks (Dense2MoE's sample_topk) are drawn without replacement, by Gumbel noise.
    Loss-free balancing (arXiv 2408.15664): b_e += u sign(mean load - load_e) after each update;
    the bias is kept as the number of steps up, so that no precision can lose it.
    """

    Options = TopKOptions
    SCORERS = tuple(SCORERS)

    def __init__(self, info: LayerInfo, options: Any):
        super().__init__(info, options)
        self.top_k = options.moe_top_k
        self.renormalized = options.moe_top_k_weights == "renormalized"
        self.sampled = options.moe_sample_top_k
        self.bias_update_rate = options.moe_bias_update_rate
        self.prioritized = options.moe_batch_prioritized_routing
        self.register_buffer(
            "bias_steps_C", torch.zeros(info.num_candidates, dtype=torch.int64))

    @classmethod
    def validate(cls, options: Any, expert_counts: Sequence[int]) -> Iterable[str]:
        validate_picks(options, expert_counts)
        check_choice(options, "moe_top_k_weights", ("raw", "renormalized"))
        check_number(options, "moe_sample_top_k", least=0, most=options.moe_top_k,
                     remedy=f"give 0 to --moe-top-k ({options.moe_top_k})")
        check_number(options, "moe_bias_update_rate", least=0, remedy="give 0 or more")
        yield from validate_priority(options)
        if options.moe_top_k_weights == "renormalized" and options.moe_top_k == 1:
            yield ("--moe-top-k-weights renormalized: with one pick its weight is 1, and the gate "
                   "learns from auxiliary losses alone")

    def route(self, x_TD: Tensor, context: GateContext) -> Choice:
        logits_TC = self.score(x_TD)
        scores_TC = self.scorer.scores(logits_TC)
        ranked_TC = scores_TC.detach() + self.bias_update_rate * self.bias_steps_C
        picks_TK = self._picks(ranked_TC, self.scorer.log_scores(logits_TC).detach(), context)
        mask_TC = torch.zeros_like(scores_TC, dtype=torch.bool).scatter_(1, picks_TK, True)
        weights_TC = scores_TC
        if self.renormalized:
            total_T1 = (scores_TC * mask_TC).sum(1, keepdim=True)
            weights_TC = scores_TC / total_T1.clamp(min=torch.finfo(scores_TC.dtype).tiny)
        priority_TC = None
        if self.prioritized:
            priority_TC = scores_TC.amax(1, keepdim=True).expand_as(scores_TC)
        return Choice(
            mask_TC=mask_TC,
            weights_TC=weights_TC,
            probs_TC=self.scorer.distribution(scores_TC),
            logits_TC=logits_TC,
            priority_TC=priority_TC,
        )

    def _picks(self, ranked_TC: Tensor, log_scores_TC: Tensor, context: GateContext) -> Tensor:
        """Candidates of each token, [T, K]."""
        if not (self.training and self.sampled and context.noise_keys_T is not None):
            return ranked_TC.topk(self.top_k, dim=1).indices
        best_TK = ranked_TC.topk(self.top_k - self.sampled, dim=1).indices
        noise_TC = gumbel(context.noise_keys_T, ranked_TC.size(1)).to(log_scores_TC.dtype)
        drawn_TC = (log_scores_TC + noise_TC).scatter(1, best_TK, float("-inf"))
        return torch.cat([best_TK, drawn_TC.topk(self.sampled, dim=1).indices], dim=1)

    def record_sizes(self) -> Mapping[str, int]:
        return {st.ASKED_C: self.info.num_candidates} if self.learns_after_updates else {}

    @property
    def learns_after_updates(self) -> bool:
        return self.bias_update_rate > 0

    def after_update(self, num_updates: int, own: Mapping[str, Tensor],
                     layers: Mapping[str, Tensor]) -> None:
        load_C = own[st.ASKED_C]
        self.bias_steps_C += torch.sign(load_C.mean() - load_C).to(self.bias_steps_C.dtype)
