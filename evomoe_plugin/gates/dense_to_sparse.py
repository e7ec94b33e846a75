"""The dense-to-sparse gate of EvoMoE (arXiv 2112.14397): from all experts to few to one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.gates.dense_to_sparse_options import (
    DenseToSparseOptions,
    annealing_updates,
    hard_updates,
    validate_dense_to_sparse,
)
from evomoe_plugin.gates.gate import Gate, GateContext, LayerInfo, register_gate
from evomoe_plugin.gates.topk_common import best
from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.choice import Choice
from evomoe_plugin.routing.noise import gumbel
from evomoe_plugin.routing.schedules import temperature


@register_gate("dense_to_sparse")
class DenseToSparseGate(Gate[DenseToSparseOptions]):
    """A (Gumbel-)softmax gate whose temperature is annealed until routing becomes hard top-1.

    With the scorer's logits z, noise ζ ~ Gumbel(0, 1) and temperature τ:

        g = softmax((z + ζ) / τ)            ζ in training only, and only while routing is soft
        A = {e : g_e > δ} ∪ {argmax g}      a token always keeps its best expert
        y = Σ_{e ∈ A} w_e E_e(x)            w = g, or softmax(z); not renormalised

    From the hard update on, A = {argmax g}. Evaluation has no noise and otherwise routes as
    training does at the same number of updates, unless `--moe-eval-gate` is given.
    """

    Options = DenseToSparseOptions
    capabilities = Capabilities(stats=(st.TEMPERATURE,))

    def __init__(self, info: LayerInfo, options: DenseToSparseOptions):
        super().__init__(info, options)
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
    def validate(cls, options: DenseToSparseOptions, expert_counts: Sequence[int]) -> list[str]:
        return validate_dense_to_sparse(options)

    def temperature(self, num_updates: int) -> float:
        """Temperature after `num_updates` completed updates."""
        return temperature(
            num_updates,
            start=self.temperature_start,
            end=self.temperature_end,
            updates=self.annealing_updates,
            schedule=self.temperature_schedule,
        )

    def is_hard(self, num_updates: int) -> bool:
        """Whether each token goes to its best expert only."""
        if not self.training and self.eval_gate != "reached":
            return self.eval_gate == "top1"
        return 0 <= self.hard_updates <= num_updates

    def route(self, x_TD: Tensor, context: GateContext) -> Choice:
        logits_TC = self.score(x_TD)
        tau = self.temperature(context.num_updates)
        hard = self.is_hard(context.num_updates)
        noisy_TC = logits_TC
        if (
            self.training
            and self.noise == "gumbel"
            and not hard
            and (context.noise_keys_T is not None)
        ):
            noise_TC = gumbel(context.noise_keys_T, logits_TC.size(1)).to(logits_TC.dtype)
            noisy_TC = logits_TC + noise_TC
        gates_TC = torch.softmax(noisy_TC / tau, dim=1)
        mask_TC = self._selected(gates_TC, hard)
        if self.combine_weights == "gate":
            weights_TC = gates_TC
        else:
            weights_TC = torch.softmax(logits_TC, dim=1)
        return Choice(
            mask_TC,
            weights_TC,
            gates_TC,
            logits_TC,
            balance_probs_TC=gates_TC * mask_TC,  # as in the authors' implementation
            stats={st.TEMPERATURE: tau * context.num_tokens(x_TD)},
        )

    def _selected(self, gates_TC: Tensor, hard: bool) -> Tensor:
        """bool [T, C]: the experts each token goes to."""
        if not self.training and self.eval_gate == "dense":
            return torch.ones_like(gates_TC, dtype=torch.bool)
        best_TC = best(gates_TC)
        return best_TC if hard else best_TC | (gates_TC > self.threshold)
