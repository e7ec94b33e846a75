"""The loss of masked language models plus the weighted auxiliary losses of the gates."""

# No `from __future__ import annotations`: fairseq reads the types of the dataclass at run time.

from dataclasses import dataclass
from typing import Any

from fairseq import utils
from fairseq.criterions import register_criterion
from fairseq.criterions.masked_lm import MaskedLmConfig, MaskedLmLoss
from fairseq.logging import metrics
from torch import Tensor

from evomoe_plugin.config.options import flag
from evomoe_plugin.criterions.gate_losses import (
    GateLosses,
    GateLossOptions,
    Recorded,
    log_inner_loss,
    log_loss,
    log_routing,
)


@dataclass
class MoEMaskedLMConfig(GateLossOptions, MaskedLmConfig):
    """Options of the gate losses."""


@register_criterion("moe_masked_lm", dataclass=MoEMaskedLMConfig)
class MoEMaskedLM(GateLosses, MaskedLmLoss):
    """The cross-entropy of masked tokens, with gate losses; perplexity is always without them."""

    def __init__(self, cfg: MoEMaskedLMConfig, task: Any):
        super().__init__(cfg, task)
        self.set_gate_losses(cfg.moe_gate_loss_wt, cfg.moe_gate_loss_combine_method)

    def sample_size(self, sample: dict[str, Any]) -> Tensor:
        return sample["target"].ne(self.padding_idx).sum()

    def forward(self, model, sample, reduce: bool = True) -> tuple[Tensor, Any, dict[str, Any]]:
        """Loss of one batch: summed over masked tokens, their number, and sums to log."""
        recorded = Recorded(model)
        inner_loss, size, logging_output = super().forward(recorded, sample, reduce)
        loss = self.add_gate_losses(inner_loss, model, sample, recorded.extra, logging_output)
        return loss, size, logging_output

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Log loss, inner_loss (both base 2), ppl, gate losses and routing statistics."""
        log_loss(logging_outputs)
        log_inner_loss(logging_outputs, "sample_size")
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["inner_loss"].avg))
        log_routing(logging_outputs)


@dataclass
class MaskedLMGumbelConfig(MoEMaskedLMConfig):
    """Without gate losses."""

    moe_gate_loss_wt: float = flag(0.0, "weight of the gates' auxiliary losses in the loss")


@register_criterion("masked_lm_gumbel", dataclass=MaskedLMGumbelConfig)
class MaskedLMGumbel(MoEMaskedLM):
    """`moe_masked_lm` under the name that EvoMoE's code has for it without gate losses."""
