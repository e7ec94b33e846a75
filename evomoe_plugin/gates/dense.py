"""The dense gate: each token goes to all candidates, always."""

from collections.abc import Sequence

import torch
from torch import Tensor

from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.gates.context import GateContext
from evomoe_plugin.gates.gate import Gate
from evomoe_plugin.gates.registry import register_gate
from evomoe_plugin.gates.scorers import ScorerOptions
from evomoe_plugin.routing.choice import Choice


@register_gate("dense")
class DenseGate(Gate[ScorerOptions]):
    """y = Σ softmax(z)_e E_e(x) over all experts, the baseline of sparse routing.

    Source: adaptive mixtures of local experts (Jacobs et al., Neural Computation 3, 1991).
    """

    Options = ScorerOptions
    capabilities = Capabilities(
        default_aux="none", capacity=False, keeps_copies_equal=True, unit_weights=True
    )

    @classmethod
    def validate(cls, options: ScorerOptions, expert_counts: Sequence[int]) -> list[str]:
        return [
            f"--moe-aux {name}: every expert gets every token with the gate dense, so this "
            "loss is constant"
            for name in cls.aux_coefficients(options)
            if name in ("balance", "switch", "load")
        ]

    def route(self, x_TD: Tensor, context: GateContext) -> Choice:
        logits_TC = self.score(x_TD, context)
        probs_TC = self.scorer.scores(logits_TC)
        mask_TC = torch.ones_like(probs_TC, dtype=torch.bool)
        return Choice(mask_TC, probs_TC, probs_TC, logits_TC, most_pairs=mask_TC.numel())
