"""The loss of masked language models plus the weighted auxiliary losses of the gates."""

# No `from __future__ import annotations`: fairseq reads the types of the dataclass at run time.

from dataclasses import dataclass
from typing import Any

from fairseq.criterions import register_criterion
from fairseq.criterions.masked_lm import MaskedLmConfig, MaskedLmLoss
from torch import Tensor

from evomoe_plugin.config.options import flag
from evomoe_plugin.criterions.gate_losses import (
    GateLossesOfFairseq,
    GateLossOptions,
    log_language_model,
)


@dataclass
class MoEMaskedLMConfig(GateLossOptions, MaskedLmConfig):
    """Options of the gate losses."""


@register_criterion("moe_masked_lm", dataclass=MoEMaskedLMConfig)
class MoEMaskedLM(GateLossesOfFairseq, MaskedLmLoss):
    """The cross-entropy of masked tokens, with gate losses; perplexity is always without them."""

    def __init__(self, cfg: MoEMaskedLMConfig, task: Any):
        super().__init__(cfg, task)
        self.set_gate_losses(
            cfg.moe_gate_loss_wt, cfg.moe_gate_loss_combine_method, cfg.moe_stability_tokens
        )

    def sample_size(self, sample: dict[str, Any]) -> Tensor:
        return sample["target"].ne(self.padding_idx).sum()

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Log loss, inner_loss (both base 2), ppl, gate losses and routing statistics."""
        log_language_model(logging_outputs, "sample_size")


@dataclass
class MaskedLMGumbelConfig(MoEMaskedLMConfig):
    """Without gate losses."""

    moe_gate_loss_wt: float = flag(0.0, "weight of the gates' auxiliary losses in the loss")


@register_criterion("masked_lm_gumbel", dataclass=MaskedLMGumbelConfig)
class MaskedLMGumbel(MoEMaskedLM):
    """`moe_masked_lm` under the name that EvoMoE's code has for it without gate losses."""
