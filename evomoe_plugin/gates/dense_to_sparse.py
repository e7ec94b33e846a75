"""The dense-to-sparse gate of EvoMoE (arXiv 2112.14397): from all experts to few to one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomoe_plugin.gates.base import Gate, GateContext, register_gate
from evomoe_plugin.gates.dense_to_sparse_options import (
    DenseToSparseOptions,
    annealing_updates,
    hard_updates,
    validate_dense_to_sparse,
)
from evomoe_plugin.options import parse_bool
from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.losses import balance_loss
from evomoe_plugin.routing.noise import gumbel
from evomoe_plugin.routing.plan import RoutingPlan, plan_from_mask
from evomoe_plugin.routing.schedules import temperature


@register_gate("dense_to_sparse")
class DenseToSparseGate(Gate):
    """A (Gumbel-)softmax gate whose temperature anneals until routing becomes hard top-1.

    With logits z = W x, noise ζ ~ Gumbel(0, 1) and temperature τ:

        g = softmax((z + ζ) / τ)            ζ in training only, and only while routing is soft
        A = {e : g_e > δ} ∪ {argmax g}      every token keeps its best expert
        y = Σ_{e ∈ A} w_e E_e(x)            w = g, or softmax(z); not renormalised

    From the hard update on A = {argmax g}. Evaluation is noiseless; it routes as training does at
    the same number of updates unless `--moe-eval-gate` says otherwise.
    """

    Options = DenseToSparseOptions
    AUX = ("balance",)
    STATS = (st.TEMPERATURE,)

    def __init__(self, model_dim: int, num_experts: int, options: Any):
        super().__init__(model_dim, num_experts, options)
        self.weight = nn.Parameter(torch.empty(num_experts, model_dim))
        nn.init.uniform_(self.weight, -(model_dim**-0.5), model_dim**-0.5)
        self.use_fp32 = parse_bool("moe_gating_use_fp32", options.moe_gating_use_fp32)
        self.temperature_start = options.moe_temperature_start
        self.temperature_end = options.moe_temperature_end
        self.temperature_schedule = options.moe_temperature_schedule
        self.annealing_updates = annealing_updates(options)
        self.hard_updates = hard_updates(options)
        self.threshold = options.moe_gate_threshold
        self.noise = options.moe_gate_noise
        self.combine_weights = options.moe_combine_weights
        self.eval_gate = options.moe_eval_gate

    @classmethod
    def validate(cls, options: Any, expert_counts: Sequence[int]) -> Iterable[str]:
        return validate_dense_to_sparse(options)

    @classmethod
    def num_parameters(cls, options: Any, model_dim: int, num_experts: int) -> int:
        return model_dim * num_experts

    def temperature(self, num_updates: int) -> float:
        """The temperature of the update that follows `num_updates` completed ones."""
        return temperature(
            num_updates,
            start=self.temperature_start,
            end=self.temperature_end,
            updates=self.annealing_updates,
            schedule=self.temperature_schedule,
        )

    def is_hard(self, num_updates: int) -> bool:
        """Whether each token goes to its best expert alone."""
        if not self.training and self.eval_gate != "reached":
            return self.eval_gate == "top1"
        return 0 <= self.hard_updates <= num_updates

    def forward(self, x_TD: Tensor, context: GateContext) -> RoutingPlan:
        """Route tokens.

        Args:
            x_TD: tokens.
            context: `noise_keys_T` None routes without noise, as evaluation does.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.use_fp32 and x_TD.dtype != torch.float64:
                logits_TE = F.linear(x_TD.float(), self.weight.float())
            else:
                logits_TE = F.linear(x_TD, self.weight.to(x_TD.dtype))

        tau = self.temperature(context.num_updates)
        hard = self.is_hard(context.num_updates)
        noisy = self.training and self.noise == "gumbel" and not hard
        noise_TE = 0.0
        if noisy and context.noise_keys_T is not None:
            noise_TE = gumbel(context.noise_keys_T, self.num_experts).to(logits_TE.dtype)
        gates_TE = torch.softmax((logits_TE + noise_TE) / tau, dim=1)

        mask_TE = self._chosen(gates_TE, hard)
        if context.token_mask_T is not None:
            mask_TE = mask_TE & context.token_mask_T.unsqueeze(1)
        if self.combine_weights == "gate":
            weights_TE = gates_TE
        else:
            weights_TE = torch.softmax(logits_TE, dim=1)

        stats = st.routing_stats(gates_TE, logits_TE, mask_TE.sum(0), context.token_mask_T)
        stats[st.TEMPERATURE] = tau * stats[st.TOKENS]
        balance = balance_loss(gates_TE * mask_TE, mask_TE, context.token_mask_T)
        return plan_from_mask(mask_TE, weights_TE, aux={"balance": balance}, stats=stats)

    def _chosen(self, gates_TE: Tensor, hard: bool) -> Tensor:
        """bool [T, E]: the experts each token goes to."""
        if not self.training and self.eval_gate == "dense":
            return torch.ones_like(gates_TE, dtype=torch.bool)
        best_TE = torch.zeros_like(gates_TE, dtype=torch.bool)
        best_TE.scatter_(1, gates_TE.argmax(1, keepdim=True), True)
        return best_TE if hard else best_TE | (gates_TE > self.threshold)
