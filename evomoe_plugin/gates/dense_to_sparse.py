"""The dense-to-sparse gate of EvoMoE (arXiv 2112.14397): from all experts to few to one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evomoe_plugin.gates.balance_bias import BiasBalancedGate
from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.dense_to_sparse_options import (
    DenseToSparseOptions,
    annealing_updates,
    hard_updates,
    validate_dense_to_sparse,
)
from evomoe_plugin.gates.registry import register_gate
from evomoe_plugin.gates.topk_common import best
from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.choice import Choice
from evomoe_plugin.routing.noise import gumbel
from evomoe_plugin.routing.schedules import temperature


@register_gate("dense_to_sparse")
class DenseToSparseGate(BiasBalancedGate[DenseToSparseOptions]):
    """A (Gumbel-)softmax gate whose temperature is annealed until routing becomes hard top-k.

    With the scorer's logits z, noise ζ ~ Gumbel(0, 1) and temperature τ:

        g = softmax((z + ζ) / τ)            ζ in training only, and only while routing is soft
        A = {e : g_e > δ} ∪ top-k g         a token always keeps its k best experts
        y = Σ_{e ∈ A} w_e E_e(x)            w = g, or softmax(z); not renormalised

    From the hard update on, A = top-k g. k is 1 in the paper, else `--moe-hard-top-k`, as
    fine-grained experts need (DeepSeekMoE, arXiv 2401.06066). Evaluation has no noise and otherwise
    routes as training does at the same number of updates, unless `--moe-eval-gate` is given.

    With `--moe-bias-update-rate` u the selection is by softmax((z + b + ζ) / τ), the weights are as
    above. After each update b_e += u sign(mean load - load_e) (loss-free balancing, arXiv
    2408.15664); the load counts the tokens that have it among their k best, since at a high
    temperature all experts have all tokens. With the temperature scope `token` z is z / sg(std z),
    the standard deviation over the candidates without gradient: a temperature means the same for
    every token, layer and update.
    """

    Options = DenseToSparseOptions
    capabilities = Capabilities(stats=(st.TEMPERATURE,))
    balanced = st.BEST_C

    def __init__(self, info: LayerInfo, options: DenseToSparseOptions):
        super().__init__(info, options)
        self.temperature_start = options.moe_temperature_start
        self.temperature_end = options.moe_temperature_end
        self.temperature_schedule = options.moe_temperature_schedule
        self.annealing_updates = annealing_updates(options)
        self.hard_updates = hard_updates(options)
        self.threshold = options.moe_gate_threshold
        self.hard_top_k = options.moe_hard_top_k
        self.noise = options.moe_gate_noise
        self.combine_weights = options.moe_combine_weights
        self.eval_gate = options.moe_eval_gate
        self.standardized = options.moe_temperature_scope == "token"
        self.bias_update_rate = options.moe_bias_update_rate
        if self.bias_update_rate:
            self.make_bias()

    @classmethod
    def validate(cls, options: DenseToSparseOptions, expert_counts: Sequence[int]) -> list[str]:
        return validate_dense_to_sparse(options, expert_counts)

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
        """Whether each token goes to its k best experts only."""
        if not self.training and self.eval_gate != "reached":
            return self.eval_gate == "top1"
        return 0 <= self.hard_updates <= num_updates

    def route(self, x_TD: Tensor, context: GateContext) -> Choice:
        logits_TC = self.score(x_TD, context)
        if self.standardized:
            logits_TC = standardized(logits_TC)
        tau = self.temperature(context.num_updates)
        hard = self.is_hard(context.num_updates)
        noisy_TC = logits_TC
        draws = self.training and self.noise == "gumbel" and not hard
        keys_T = context.noise_keys_T if draws else None
        if keys_T is not None:
            noisy_TC = logits_TC + gumbel(keys_T, logits_TC.size(1)).to(logits_TC.dtype)
        gates_TC = torch.softmax(noisy_TC / tau, dim=1)
        selecting_TC = gates_TC
        if self.bias_update_rate:
            bias_C = self.bias_C.to(noisy_TC.dtype)
            selecting_TC = torch.softmax((noisy_TC.detach() + bias_C) / tau, dim=1)
        best_TC = best(selecting_TC, self._hard_k)
        mask_TC = self._selected(selecting_TC, best_TC, hard)
        if self.combine_weights == "gate":
            weights_TC = gates_TC
        else:
            weights_TC = torch.softmax(logits_TC, dim=1)
        stats = {st.TEMPERATURE: tau * context.num_tokens(x_TD)}
        if self.bias_update_rate:
            counted_TC = best_TC
            if context.token_mask_T is not None:
                counted_TC = best_TC & context.token_mask_T.unsqueeze(1)
            stats[st.BEST_C] = counted_TC.sum(0).double()
        return Choice(
            mask_TC,
            weights_TC,
            gates_TC,
            logits_TC,
            balance_probs_TC=gates_TC * mask_TC,  # as in the authors' implementation
            most_pairs=self._most_pairs(mask_TC, hard),
            stats=stats,
        )

    def _most_pairs(self, mask_TC: Tensor, hard: bool) -> int | None:
        if not self.training and self.eval_gate == "dense":
            return mask_TC.numel()
        return mask_TC.size(0) * self._hard_k if hard else None

    @property
    def _hard_k(self) -> int:
        """`--moe-hard-top-k`; top-1 evaluation has 1."""
        return 1 if not self.training and self.eval_gate == "top1" else self.hard_top_k

    def _selected(self, gates_TC: Tensor, best_TC: Tensor, hard: bool) -> Tensor:
        """bool [T, C]: the experts each token goes to."""
        if not self.training and self.eval_gate == "dense":
            return torch.ones_like(gates_TC, dtype=torch.bool)
        return best_TC if hard else best_TC | (gates_TC > self.threshold)

    def zero_stats(self, device: torch.device) -> dict[str, Tensor]:
        stats = super().zero_stats(device)
        if self.bias_update_rate:
            stats[st.BEST_C] = torch.zeros_like(self.bias_C)
        return stats


def standardized(logits_TC: Tensor) -> Tensor:
    """z / std z over the candidates of each token, the deviation without gradient.

    Rows of equal logits, and those of a single candidate, stay as they are.
    """
    std_T1 = logits_TC.detach().std(1, correction=0, keepdim=True)
    return logits_TC / torch.where(std_T1 > 0, std_T1, 1.0)
