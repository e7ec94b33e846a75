"""Label-smoothed cross-entropy plus the weighted auxiliary losses of the gates."""

# No `from __future__ import annotations`: fairseq reads the types of the dataclass at run time.

from dataclasses import dataclass
from typing import Any, Optional

from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from torch import Tensor

from evomoe_plugin.criterions.gate_losses import (
    GateLossesOfFairseq,
    GateLossOptions,
    VocabChunkOptions,
    check_vocab_chunk,
    log_inner_loss,
    log_routing,
)


@dataclass
class MoELabelSmoothedCrossEntropyConfig(
    VocabChunkOptions, GateLossOptions, LabelSmoothedCrossEntropyCriterionConfig
):
    """Options of the gate losses and of label smoothing."""


@register_criterion(
    "moe_label_smoothed_cross_entropy", dataclass=MoELabelSmoothedCrossEntropyConfig
)
class MoELabelSmoothedCrossEntropy(GateLossesOfFairseq, LabelSmoothedCrossEntropyCriterion):
    """fairseq's label-smoothed cross-entropy with gate losses.

    `inner_loss` is without gate losses, `nll_loss` and perplexity without smoothing too. With
    `report_accuracy` the logits of all tokens are computed at once.
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
        moe_vocab_chunk: Optional[int] = None,
        moe_stability_tokens: int = 4096,
    ):
        super().__init__(task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy)
        self.set_gate_losses(moe_gate_loss_wt, moe_gate_loss_combine_method, moe_stability_tokens)
        self.vocab_chunk = check_vocab_chunk(moe_vocab_chunk)

    def sample_size(self, sample: dict[str, Any]) -> int:
        return sample["target"].size(0) if self.sentence_avg else sample["ntokens"]

    def forward(self, model, sample, reduce: bool = True) -> tuple[Tensor, Any, dict[str, Any]]:
        """Loss of one batch: summed over tokens, the sample size, and sums to log."""
        chunked = getattr(model, "gives_losses", False) and self.vocab_chunk != 0
        if self.report_accuracy or not chunked:
            return super().forward(model, sample, reduce)
        targets = sample["target"].clone()
        targets[:, : self.ignore_prefix_size] = self.padding_idx
        (inner_loss, nll_loss), extra = model(
            **sample["net_input"],
            targets=targets,
            vocab_chunk=self.vocab_chunk,
            reduce=reduce,
            label_smoothing=self.eps,
        )
        size = self.sample_size(sample)
        logging_output = {
            "nll_loss": nll_loss.detach(),
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": size,
        }
        loss = self.add_gate_losses(inner_loss, model, sample, extra, logging_output)
        return loss, size, logging_output

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Log what fairseq does, inner_loss, gate losses and routing statistics."""
        super().reduce_metrics(logging_outputs)
        log_inner_loss(logging_outputs, "sample_size")
        log_routing(logging_outputs)
