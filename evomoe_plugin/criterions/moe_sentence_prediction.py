"""The loss of sentence classification and regression plus the auxiliary losses of the gates."""

# No `from __future__ import annotations`: fairseq reads the types of the dataclass at run time.

from dataclasses import dataclass
from typing import Any

from fairseq.criterions import register_criterion
from fairseq.criterions.sentence_prediction import (
    SentencePredictionConfig,
    SentencePredictionCriterion,
)

from evomoe_plugin.criterions.gate_losses import (
    GateLossesOfFairseq,
    GateLossOptions,
    log_inner_loss,
    log_routing,
)


@dataclass
class MoESentencePredictionConfig(GateLossOptions, SentencePredictionConfig):
    """Options of the gate losses and of fairseq's criterion."""


@register_criterion("moe_sentence_prediction", dataclass=MoESentencePredictionConfig)
class MoESentencePrediction(GateLossesOfFairseq, SentencePredictionCriterion):
    """fairseq's criterion of GLUE tasks with gate losses."""

    computes_targets = False

    def __init__(self, cfg: MoESentencePredictionConfig, task: Any):
        super().__init__(cfg, task)
        self.set_gate_losses(
            cfg.moe_gate_loss_wt, cfg.moe_gate_loss_combine_method, cfg.moe_stability_tokens
        )

    def sample_size(self, sample: dict[str, Any]) -> int:
        return sample["target"].numel()

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Log what fairseq does, inner_loss, gate losses and routing statistics."""
        SentencePredictionCriterion.reduce_metrics(logging_outputs)
        log_inner_loss(logging_outputs, "sample_size")
        log_routing(logging_outputs)

    def logging_outputs_can_be_summed(self) -> bool:
        """Not where predictions are logged, for the scores of GLUE: they are lists."""
        return not self.keep_pred_and_targ
