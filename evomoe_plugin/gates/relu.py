"""The ReLU gate of ReMoE: an expert works on a token where its logit is positive."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomoe_plugin.config.options import flag
from evomoe_plugin.config.values import check_number
from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.fp64_buffers import fp64_buffer, register_fp64_buffer
from evomoe_plugin.gates.gate import Gate
from evomoe_plugin.gates.registry import register_gate
from evomoe_plugin.gates.scorers import ScorerOptions
from evomoe_plugin.gates.topk_common import TopKCountOptions, validate_top_k
from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.choice import Choice
from evomoe_plugin.routing.losses import weighted_mean

# The coefficient stays within this factor of its start in both directions, so that it stays finite
# and recovers after a long time with an unreachable target.
COEFFICIENT_RANGE = 1e12


@dataclass
class ReluOptions(TopKCountOptions, ScorerOptions):
    """Options of the ReLU gate; `moe_top_k` is the target mean number of experts per token."""

    moe_l1_start: float = flag(1e-8, "coefficient of the L1 loss at update 0")
    moe_l1_factor: float = flag(
        1.2,
        "after each update the coefficient is multiplied by this if tokens had more than "
        "--moe-top-k experts on average, divided by it if fewer",
    )


def balanced_l1_loss(
    *, weights_TE: Tensor, mask_TE: Tensor, top_k: int, weight_T: Tensor | None = None
) -> Tensor:
    """1 / T Σ_t Σ_e f_e w_te with f_e = E / (k T) n_e, n_e tokens of expert e, k = `top_k`.

    f has no gradient. Source: ReMoE (arXiv 2412.14711, equations 10 and 11) for one layer, and its
    code, without a division by E.
    """
    E = mask_TE.size(1)
    load_E = E / top_k * weighted_mean(mask_TE.to(weights_TE.dtype), weight_T)
    return (load_E * weighted_mean(weights_TE, weight_T)).sum()


@register_gate("relu")
class ReluGate(Gate[ReluOptions]):
    """y = Σ_e w_e E_e(x), w = relu(z), over the experts with w_e > 0; z the scorer's logits.

    A token without a positive logit has no expert, in training and evaluation: only the residual
    stream carries it. The loss `l1`, λ times the load-balanced L1 norm of w, drives the sparsity to
    1 - k / E, k = `--moe-top-k`: after each update λ is multiplied by α^sign(target - sparsity),
    measured over the pairs of all layers, ranks and micro-batches before any capacity.

    Source: ReMoE (arXiv 2412.14711).
    """

    Options = ReluOptions
    # From 0 no logit would be above 0, no expert have a token, and no parameter a gradient.
    capabilities = Capabilities(
        losses=("l1",),
        default_aux="l1=1",
        stats=(st.COEFFICIENT,),
        null_experts=False,
        zero_init=False,
    )

    def __init__(self, info: LayerInfo, options: ReluOptions):
        super().__init__(info, options)
        self.top_k = options.moe_top_k
        self.l1_start = options.moe_l1_start
        self.l1_factor = options.moe_l1_factor
        # λ E: in older checkpoints, whose loss was a mean over experts, λ was E times the present.
        stored = torch.tensor(self.l1_start * info.num_experts, dtype=torch.float64)
        register_fp64_buffer(self, "coefficient", stored)

    @classmethod
    def validate(cls, options: ReluOptions, expert_counts: Sequence[int]) -> list[str]:
        validate_top_k(options, expert_counts)
        check_number(
            options, "moe_l1_start", "(0, 1]", "give a number above 0 and at most 1, such as 1e-8"
        )
        check_number(
            options, "moe_l1_factor", "(1, 10]", "give a factor above 1 and at most 10, such as 1.2"
        )
        if cls.aux_coefficients(options).get("l1"):
            return []
        return [
            "--moe-aux without l1: nothing drives the number of experts per token towards "
            "--moe-top-k"
        ]

    @property
    def coefficient(self) -> Tensor:
        """λ, fp64."""
        return fp64_buffer(self, "coefficient") / self.num_experts

    def route(self, x_TD: Tensor, context: GateContext) -> Choice:
        logits_TE = self.score(x_TD, context)
        weights_TE = torch.relu(logits_TE)
        mask_TE = weights_TE > 0
        l1 = balanced_l1_loss(
            weights_TE=weights_TE,
            mask_TE=mask_TE,
            top_k=self.top_k,
            weight_T=context.loss_weights_T,
        )
        return Choice(
            mask_TE,
            weights_TE,
            _shares(weights_TE),
            logits_TE,
            aux={"l1": self.coefficient.to(l1.dtype) * l1},
            stats={st.COEFFICIENT: self.coefficient * context.num_tokens(x_TD)},
        )

    @property
    def learns_after_updates(self) -> bool:
        return "l1" in self.aux_names

    def after_update(
        self, num_updates: int, own: Mapping[str, Tensor], layers: Mapping[str, Tensor]
    ) -> None:
        pairs = layers[st.PAIRS].sum()
        if st.DROPPED in layers:
            pairs = pairs + layers[st.DROPPED].sum()
        # sparsity = 1 - pairs / (E T): below its target exactly when tokens have more than k.
        excess = pairs - self.top_k * layers[st.TOKENS].sum()
        start = self.l1_start * self.num_experts
        stored = fp64_buffer(self, "coefficient")
        stored.mul_(self.l1_factor ** torch.sign(excess))
        stored.clamp_(start / COEFFICIENT_RANGE, start * COEFFICIENT_RANGE)


def _shares(weights_TE: Tensor) -> Tensor:
    """The weights scaled to sum 1; uniform where all are 0."""
    # Divide by the largest first: a sum of large weights could overflow.
    most_T1 = weights_TE.amax(1, keepdim=True)
    some_T1 = most_T1 > 0
    weights_TE = weights_TE / torch.where(some_T1, most_T1, torch.ones_like(most_T1)).detach()
    total_T1 = weights_TE.sum(1, keepdim=True)
    shares_TE = weights_TE / torch.where(some_T1, total_T1, torch.ones_like(total_T1))
    return torch.where(some_T1, shares_TE, 1 / weights_TE.size(1))
