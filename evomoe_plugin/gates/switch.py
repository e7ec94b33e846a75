"""The Switch gate: each token goes to its best candidate."""

from collections.abc import Sequence

from torch import Tensor

from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.gates.context import GateContext
from evomoe_plugin.gates.gate import Gate
from evomoe_plugin.gates.registry import register_gate
from evomoe_plugin.gates.scorers import ScorerOptions
from evomoe_plugin.gates.topk_common import best
from evomoe_plugin.routing.choice import Choice


@register_gate("switch")
class SwitchGate(Gate[ScorerOptions]):
    """y = p_e E_e(x) for e = argmax p, with p = softmax(z): the weight is not normalised.

    Source: Switch Transformers (arXiv 2101.03961); fairseq's `--moe-top1-expert`, whose capacity
    factor is always 1; here it is `--moe-capacity-factor`.
    """

    Options = ScorerOptions
    capabilities = Capabilities(fixed_k=True)

    @classmethod
    def validate(cls, options: ScorerOptions, expert_counts: Sequence[int]) -> list[str]:
        if not options.moe_renormalize_after_drop:
            return []
        return [
            "--moe-renormalize-after-drop: the gate switch selects one expert, which is kept "
            "or dropped; this changes nothing"
        ]

    def route(self, x_TD: Tensor, context: GateContext) -> Choice:
        logits_TC = self.score(x_TD, context)
        probs_TC = self.scorer.scores(logits_TC)
        return Choice(best(logits_TC), probs_TC, probs_TC, logits_TC, most_pairs=len(x_TD))
