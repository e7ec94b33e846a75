"""The gate of StableMoE: it learns to route, then freezes the learned routing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import ModelOptions, flag, gated_updates
from evomoe_plugin.config.values import check_number
from evomoe_plugin.gates.base_layers import centroids
from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.gate import Gate
from evomoe_plugin.gates.registry import register_gate
from evomoe_plugin.gates.topk_common import selection_mask
from evomoe_plugin.routing.choice import Choice
from evomoe_plugin.routing.losses import weighted_mean

# Default length of stage 1 as a share of the run: the paper's 6000 of 60000 updates.
DEFAULT_STABLE_SHARE = 0.1


@dataclass
class StableOptions(ModelOptions):
    """Options of the StableMoE gate."""

    moe_stable_updates: Optional[int] = flag(
        None, "update from which routing is frozen (default: 10%% of --max-update)"
    )
    moe_stable_dim: int = flag(50, "width of the word embeddings that determine the frozen routing")


def stable_updates(options: StableOptions) -> int:
    """The update from which routing is frozen, with the default resolved."""
    if options.moe_stable_updates is not None:
        return options.moe_stable_updates
    return max(1, round(DEFAULT_STABLE_SHARE * gated_updates(options)))


def greedy_balance_loss(
    *, scores_TE: Tensor, mask_TE: Tensor, weight_T: Tensor | None = None
) -> Tensor:
    """Σ_e (n_e - n) / n * (1/T) Σ_{t at e} σ(s_te): 0 for an even load, with n_e tokens of
    expert e and the mean n = T / E.

    Args:
        scores_TE: σ(s).
    Source: StableMoE (arXiv 2204.08396), with a mean instead of the sum over tokens, as in the
    task's loss.
    """
    load_E = weighted_mean(mask_TE.to(scores_TE.dtype), weight_T)
    excess_E = load_E.size(0) * load_E - 1
    return (excess_E * weighted_mean(scores_TE * mask_TE, weight_T)).sum()


@register_gate("stable")
class StableGate(Gate[StableOptions]):
    """y = σ(s_e) E_e(x) with s = x·w, one expert e per token, in two stages.

    Stage 1, until `--moe-stable-updates`: e = argmax s. The loss `greedy_balance` evens the load;
    `distill`, a cross-entropy with target e, trains a second router, which sees only word
    embeddings of its own.

    Stage 2: e is the output of the second router for the token id. In the first forward pass the
    output for every token id is written to a table, which neither the optimizer nor a later end of
    stage 1 in a prolonged run can change. Both losses are 0. Training that restarts at update 0
    starts with stage 1 again.

    Source: StableMoE (arXiv 2204.08396).
    """

    Options = StableOptions
    capabilities = Capabilities(
        losses=("greedy_balance", "distill"),
        default_aux="greedy_balance=0.3,distill=0.3",
        null_experts=False,
        zero_init=False,
        vectors=True,
        fixed_k=True,
    )

    table_V: Tensor
    frozen_at: Tensor

    def __init__(self, info: LayerInfo, options: StableOptions):
        super().__init__(info, options)
        vocabulary, dim = len(info.token_counts_V), options.moe_stable_dim
        if not vocabulary:
            raise OptionError(
                "moe_gate", "stable", "it routes by token ids, and no vocabulary is known here"
            )
        self.stable_updates = stable_updates(options)
        self.scorer = centroids(info)
        self.word_embedding = nn.Parameter(torch.randn(vocabulary, dim) * dim**-0.5)
        self.word_centroids = nn.Parameter(torch.empty(info.num_experts, dim))
        nn.init.orthogonal_(self.word_centroids)
        self.register_buffer("table_V", torch.zeros(vocabulary, dtype=torch.int64))
        # The update at which the table was written; -1: not yet.
        self.register_buffer("frozen_at", torch.full((), -1, dtype=torch.int64))
        self._frozen_at = -1  # the same, for which the host need not wait
        self.register_load_state_dict_post_hook(_read_frozen_at)

    @classmethod
    def validate(cls, options: StableOptions, expert_counts: Sequence[int]) -> list[str]:
        check_number(options, "moe_stable_updates", "[0, inf)", "give 0 or more")
        check_number(options, "moe_stable_dim", "[1, inf)", "give a width of at least 1")
        if options.moe_stable_updates is None and not options.max_update:
            raise OptionError(
                "moe_stable_updates",
                "(not given)",
                "give it, or --max-update, of which stage 1 is 10 % by default",
            )
        warnings = []
        if not cls.aux_coefficients(options).get("distill") or stable_updates(options) == 0:
            warnings.append(
                "--moe-gate stable: the frozen routing will be that of an untrained router; "
                "--moe-aux distill=0.3 trains it until --moe-stable-updates"
            )
        if options.moe_weight_scale == "unit":
            warnings.append(
                "--moe-weight-scale unit: once routing is frozen, the weight of the gate stable is "
                "always 1, and what its scorer learns has no effect any more"
            )
        frozen = stable_updates(options) + (options.moe_spawn_updates or 0)
        if options.max_update and frozen >= options.max_update:
            warnings.append(
                f"--max-update {options.max_update}: the run ends before routing is "
                f"frozen at update {frozen}"
            )
        return warnings

    def flops_per_token(self) -> int:
        embedding = 2 * self.word_embedding.numel()  # a lookup, not a matmul
        return super().flops_per_token() - embedding

    def route(self, x_TD: Tensor, context: GateContext) -> Choice:
        if context.token_ids_T is None:
            raise ValueError("the gate stable routes by token ids: give token_ids_T")
        if self._is_frozen(context.num_updates):
            return self._frozen(x_TD, context.token_ids_T)
        return self._learned(x_TD, context.token_ids_T, context.loss_weights_T)

    @torch.no_grad()
    def _is_frozen(self, num_updates: int) -> bool:
        if 0 <= self._frozen_at <= num_updates:
            return True
        if num_updates < self.stable_updates:
            if self.training:
                self._freeze_at(-1)
            return False
        self.table_V.copy_(self._word_logits(self.word_embedding.float()).argmax(1))
        self._freeze_at(num_updates)
        return True

    def _freeze_at(self, num_updates: int) -> None:
        if num_updates != self._frozen_at:
            self._frozen_at = num_updates
            self.frozen_at.fill_(num_updates)

    def _learned(self, x_TD: Tensor, token_ids_T: Tensor, weight_T: Tensor | None) -> Choice:
        logits_TE = self.score(x_TD)
        scores_TE = torch.sigmoid(logits_TE)
        expert_T = logits_TE.argmax(1)
        mask_TE = selection_mask(expert_T.unsqueeze(1), self.num_experts)
        words_TE = self._word_logits(F.embedding(token_ids_T, self.word_embedding))
        loss_T = F.cross_entropy(words_TE, expert_T, reduction="none")
        return Choice(
            mask_TE,
            scores_TE,
            torch.softmax(logits_TE, dim=1),
            logits_TE,
            most_pairs=len(x_TD),
            aux={
                "greedy_balance": greedy_balance_loss(
                    scores_TE=scores_TE, mask_TE=mask_TE, weight_T=weight_T
                ),
                "distill": weighted_mean(loss_T.unsqueeze(1), weight_T).squeeze(0),
            },
        )

    def _frozen(self, x_TD: Tensor, token_ids_T: Tensor) -> Choice:
        logits_TE = self.score(x_TD)
        ids_T1 = self.table_V[token_ids_T].unsqueeze(1)
        mask_TE = selection_mask(ids_T1, self.num_experts)
        return Choice(
            mask_TE,
            torch.sigmoid(logits_TE),
            mask_TE.to(logits_TE.dtype),
            logits_TE,
            most_pairs=len(x_TD),
            aux=dict.fromkeys(self.capabilities.losses, logits_TE.new_zeros(())),
        )

    def _word_logits(self, words: Tensor) -> Tensor:
        words = words.float() if self.use_fp32 and words.dtype != torch.float64 else words
        return F.linear(words, self.word_centroids.to(words.dtype))


def _read_frozen_at(gate: StableGate, _incompatible_keys) -> None:
    gate._frozen_at = int(gate.frozen_at)
