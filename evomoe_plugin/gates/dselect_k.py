"""The DSelect-k gate: k selectors encode an expert's index in relaxed bits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomoe_plugin.config.options import flag
from evomoe_plugin.config.values import check_number
from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.gate import Gate
from evomoe_plugin.gates.registry import register_gate
from evomoe_plugin.gates.topk_common import TopKCountOptions, validate_top_k
from evomoe_plugin.routing.choice import Choice
from evomoe_plugin.routing.losses import entropy_loss, weighted_mean

# Lower bound of the divisor in `selector_validity`, which is therefore at most 99.
LEAST_VALID_MASS = 0.01


@dataclass
class DSelectKOptions(TopKCountOptions):
    """Options of the DSelect-k gate; `moe_top_k` is the number of selectors."""

    moe_smooth_step_width: float = flag(
        1.0,
        "width of the smooth step: a selector's bit is fractional while the absolute value of its "
        "logit is less than half of this",
    )


def smooth_step(x: Tensor, width: float) -> Tensor:
    """S(x) = -2 (x/g)^3 + 3/2 x/g + 1/2 for |x| <= g/2, exactly 0 below and exactly 1 above.

    Its derivative is continuous, and 0 from ±g/2 on.

    Args:
        width: g > 0.
    Source: Hazimeh et al., "The tree ensemble layer" (arXiv 2002.07772); DSelect-k (arXiv
    2106.03760, 3.1).
    """
    share = (x / width).clamp(-0.5, 0.5)
    return (1.5 - 2 * share * share) * share + 0.5


@register_gate("dselect_k")
class DSelectKGate(Gate[DSelectKOptions]):
    """y = Σ_e w_e E_e(x), w_e = Σ_i softmax(α)_i r_e^(i), over the experts with w_e > 0.

    Each of the k = `--moe-top-k` selectors has m = ceil(log2 E) logits z, linear in the token as is
    α. r_e is the product over the bits of e in binary: S(z_b) where bit b is 1, 1 - S(z_b) where it
    is 0; S is the smooth step. At the start all z are near 0 and every expert is selected; a
    selector whose bits have hardened selects one expert, so a token ends with at most k pairs.
    Training and evaluation route in the same way.

    If E is not a power of 2, a code >= E is mapped to the valid code without its highest bit: no
    mass is lost, w sums to 1 without a division. (In the paper the mass of such codes is lost.)

    Losses: `selector_entropy`, the sum of the selectors' entropies, hardens them.
    `selector_validity`, Σ_i (1 / max(Σ_{e < E} r_e^(i), 0.01) - 1), the paper's term minus its
    minimum, pushes them away from codes >= E; it is 0 if E is a power of 2, so it can always be on.
    Both are means over tokens.

    Source: DSelect-k (arXiv 2106.03760), with per-token selectors.
    """

    Options = DSelectKOptions
    capabilities = Capabilities(
        losses=("selector_entropy", "selector_validity"),
        default_aux="selector_entropy=0.01,selector_validity=0.01",
        logits=False,
        null_experts=False,
        zero_init=False,
        unit_weights=True,
    )

    def __init__(self, info: LayerInfo, options: DSelectKOptions):
        super().__init__(info, options)
        self.selectors = options.moe_top_k
        self.width = options.moe_smooth_step_width
        self.bits = (info.num_experts - 1).bit_length()
        # One row for each selector's α and one for each of its bits. The norm of tokens is about
        # sqrt(D), so z starts within a tenth of the step: fractional, and different for each bit.
        bound = 0.1 * self.width * info.model_dim**-0.5
        self.weight = nn.Parameter(
            torch.empty(self.selectors * (1 + self.bits), info.model_dim).uniform_(-bound, bound)
        )

    @classmethod
    def validate(cls, options: DSelectKOptions, expert_counts: Sequence[int]) -> list[str]:
        validate_top_k(options, expert_counts)
        check_number(options, "moe_smooth_step_width", "(0, inf)", "give a width above 0")
        return []

    def route(self, x_TD: Tensor, context: GateContext) -> Choice:
        E, K = self.num_experts, self.selectors
        logits = F.linear(x_TD, self.weight.to(x_TD.dtype))
        alpha_TK = torch.softmax(logits[:, :K], dim=1)
        codes = self._codes(logits[:, K:].unflatten(1, (K, self.bits)))
        valid_TK = codes[..., :E].sum(-1)
        selected_TKE = codes[..., :E]
        if codes.size(-1) > E:
            spare = codes[..., E:]
            first = E - codes.size(-1) // 2  # code E without its highest bit
            selected_TKE = selected_TKE + F.pad(spare, (first, E - first - spare.size(-1)))
        weights_TE = (alpha_TK.unsqueeze(2) * selected_TKE).sum(1)
        weight_T = context.loss_weights_T
        invalid_TK = 1 / valid_TK.clamp(min=LEAST_VALID_MASS, max=1) - 1
        return Choice(
            weights_TE > 0,
            weights_TE,
            weights_TE,
            aux={
                "selector_entropy": torch.stack(
                    [
                        entropy_loss(probs_TC=selected_TE, weight_T=weight_T)
                        for selected_TE in selected_TKE.unbind(1)
                    ]
                ).sum(),
                "selector_validity": weighted_mean(invalid_TK, weight_T).sum(),
            },
        )

    def _codes(self, logits_TKB: Tensor) -> Tensor:
        """Weights of the 2^m codes for each selector, [T, K, 2^m]; they sum to 1."""
        codes = logits_TKB.new_ones(*logits_TKB.shape[:2], 1)
        for one_TK1 in smooth_step(logits_TKB, self.width).split(1, dim=2) if self.bits else ():
            codes = torch.cat([codes * (1 - one_TK1), codes * one_TK1], dim=2)
        return codes
