"""Label-smoothed cross-entropy plus the weighted auxiliary losses of the gates."""

# No `from __future__ import annotations`: fairseq reads the types of the dataclass at run time.

from dataclasses import dataclass
from typing import Any

from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from torch import Tensor

from evomoe_plugin.criterions.gate_losses import (
    GateLosses,
    GateLossOptions,
    Recorded,
    log_inner_loss,
    log_routing,
)


@dataclass
class MoELabelSmoothedCrossEntropyConfig(GateLossOptions, LabelSmoothedCrossEntropyCriterionConfig):
    """Options of the gate losses and of label smoothing."""


@register_criterion(
    "moe_label_smoothed_cross_entropy", dataclass=MoELabelSmoothedCrossEntropyConfig
)
class MoELabelSmoothedCrossEntropy(GateLosses, LabelSmoothedCrossEntropyCriterion):
    """fairseq's label-smoothed cross-entropy with gate losses.

    `inner_loss` is without gate losses, `nll_loss` and perplexity without smoothing too.
    """

    def __init__(
        self,
        task: Any,
        sentence_avg: bool,
        label_smoothing: float,
        ignore_prefix_size: int = 0,
        report_accuracy: bool = False,
        moe_gate_loss_wt: float = 1.0,
        moe_gate_loss_combine_method: str = "average",
    ):
        super().__init__(task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy)
        self.set_gate_losses(moe_gate_loss_wt, moe_gate_loss_combine_method)

    def sample_size(self, sample: dict[str, Any]) -> int:
        return sample["target"].size(0) if self.sentence_avg else sample["ntokens"]

    def forward(self, model, sample, reduce: bool = True) -> tuple[Tensor, Any, dict[str, Any]]:
        """Loss of one batch: summed over tokens, the sample size, and sums to log."""
        recorded = Recorded(model)
        inner_loss, size, logging_output = super().forward(recorded, sample, reduce)
        loss = self.add_gate_losses(inner_loss, model, sample, recorded.extra, logging_output)
        return loss, size, logging_output

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Log what fairseq does, inner_loss, gate losses and routing statistics."""
        super().reduce_metrics(logging_outputs)
        log_inner_loss(logging_outputs, "sample_size")
        log_routing(logging_outputs)
