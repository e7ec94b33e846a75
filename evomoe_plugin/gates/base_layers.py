"""The gate of BASE layers: in training every expert gets the same number of tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evomoe_plugin.config.options import ModelOptions, is_causal
from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.gate import Gate
from evomoe_plugin.gates.registry import register_gate
from evomoe_plugin.gates.scorers import LinearScorer
from evomoe_plugin.gates.topk_common import selection_mask
from evomoe_plugin.routing.assignment import balanced_assignment
from evomoe_plugin.routing.choice import Choice


def centroids(info: LayerInfo) -> LinearScorer:
    """A linear scorer with orthogonally initialised vectors, gain 0.1."""
    scorer = LinearScorer(info.model_dim, info.num_experts)
    nn.init.orthogonal_(scorer.weight, gain=0.1)
    return scorer


MANY_EXPERTS = 128
"""More experts than this make the assignment slow."""


@register_gate("base")
class BASELayersGate(Gate[ModelOptions]):
    """y = σ(x·w_e) E_e(x) for one expert e per token, without a balance loss.

    In training e comes from the assignment that gives every expert floor(T / E) or ceil(T / E)
    of the T real tokens and has the largest total Σ x·w_e (`routing.assignment`). In evaluation
    e = argmax x·w_e. Each rank and micro-batch is balanced on its own, which balances all of them
    without communication.

    With the residual connection around the layer this equals BASE's x + σ (F(x) - x), where
    F(x) = x + E_e(x) includes the residual.

    Source: BASE layers (arXiv 2103.16716).
    """

    capabilities = Capabilities(
        default_aux="none", null_experts=False, capacity=False, vectors=True
    )

    def __init__(self, info: LayerInfo, options: ModelOptions):
        super().__init__(info, options)
        self.scorer = centroids(info)

    @classmethod
    def validate(cls, options: ModelOptions, expert_counts: Sequence[int]) -> list[str]:
        warnings = []
        if is_causal(options):
            warnings.append(
                "--moe-gate base: in training, a token's expert depends on later tokens of the "
                "batch too, which is not causal; evaluation takes each token's best expert"
            )
        if max(expert_counts) > MANY_EXPERTS:
            warnings.append(
                f"--moe-expert-count {options.moe_expert_count}: the balanced assignment to more "
                f"than {MANY_EXPERTS} experts takes seconds per layer and step on a CPU"
            )
        return warnings

    def route(self, x_TD: Tensor, context: GateContext) -> Choice:
        logits_TE = self.score(x_TD, context)
        if self.training:
            expert_T = self._balanced(logits_TE.detach(), context.token_mask_T)
        else:
            expert_T = logits_TE.argmax(1)
        mask_TE = selection_mask(expert_T.unsqueeze(1), self.num_experts)
        probs_TE = logits_TE.softmax(dim=1)
        return Choice(mask_TE, logits_TE.sigmoid(), probs_TE, logits_TE, most_pairs=len(x_TD))

    def _balanced(self, logits_TE: Tensor, token_mask_T: Tensor | None) -> Tensor:
        if token_mask_T is None:
            return balanced_assignment(logits_TE)
        expert_T = torch.zeros_like(token_mask_T, dtype=torch.int64)
        expert_T[token_mask_T] = balanced_assignment(logits_TE[token_mask_T])
        return expert_T
