"""Cross-entropy plus the weighted auxiliary losses of the gates."""

# No `from __future__ import annotations`: fairseq reads the types of the dataclass at run time.

import functools
import logging
from dataclasses import dataclass
from typing import Any, Optional

from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from torch import Tensor

from evomoe_plugin.config.options import flag
from evomoe_plugin.criterions.gate_losses import (
    GateLosses,
    GateLossOptions,
    VocabChunkOptions,
    check_vocab_chunk,
    log_language_model,
)

logger = logging.getLogger(__name__)


@dataclass
class MoECrossEntropyCriterionConfig(
    VocabChunkOptions, GateLossOptions, CrossEntropyCriterionConfig
):
    """Options of the gate losses, and how the cross-entropy is computed."""


@register_criterion("moe_cross_entropy", dataclass=MoECrossEntropyCriterionConfig)
class MoECrossEntropyCriterion(GateLosses, CrossEntropyCriterion):
    """The cross-entropy of all tokens, with gate losses; perplexity is always without them."""

    def __init__(
        self,
        task: Any,
        sentence_avg: bool,
        moe_gate_loss_wt: float = 1.0,
        moe_gate_loss_combine_method: str = "average",
        moe_vocab_chunk: Optional[int] = None,
        moe_stability_tokens: int = 4096,
    ):
        super().__init__(task, sentence_avg)
        self.set_gate_losses(moe_gate_loss_wt, moe_gate_loss_combine_method, moe_stability_tokens)
        self.vocab_chunk = check_vocab_chunk(moe_vocab_chunk)
        source, target = (
            getattr(task, f"{side}_dictionary", None) for side in ("source", "target")
        )
        is_translation = source is not target
        self.counts_tokens = sentence_avg or getattr(task, "has_context", False) or is_translation

    def sample_size(self, sample: dict[str, Any]) -> int:
        return sample["target"].size(0) if self.sentence_avg else sample["ntokens"]

    def forward(self, model, sample, reduce: bool = True) -> tuple[Tensor, Any, dict[str, Any]]:
        """Loss of one batch.

        Returns:
            the loss, summed over tokens; the sample size to divide it by; the logging output: sums
            that may be added over batches and ranks, and `moe_token_routing` (`add_gate_losses`).
        """
        inner_loss, extra = self._cross_entropy(model, sample, reduce)
        sample_size = self.sample_size(sample)
        logging_output = {
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }
        loss = self.add_gate_losses(inner_loss, model, sample, extra, logging_output)
        return loss, sample_size, logging_output

    def _cross_entropy(self, model, sample, reduce: bool) -> tuple[Tensor, dict[str, Any]]:
        """The cross-entropy and the other outputs of the model."""
        if self.vocab_chunk != 0:
            if getattr(model, "gives_losses", False):
                return model(
                    **sample["net_input"],
                    targets=sample["target"],
                    vocab_chunk=self.vocab_chunk,
                    reduce=reduce,
                )
            _log_unchunked()
        net_output = model(**sample["net_input"])
        return self.compute_loss(model, net_output, sample, reduce=reduce)[0], net_output[1]

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Log loss, inner_loss (both base 2), ppl, gate losses and routing statistics."""
        log_language_model(logging_outputs, "ntokens")


@dataclass
class CrossEntropyGumbelConfig(MoECrossEntropyCriterionConfig):
    """Without gate losses."""

    moe_gate_loss_wt: float = flag(0.0, "weight of the gates' auxiliary losses in the loss")


@register_criterion("cross_entropy_gumbel", dataclass=CrossEntropyGumbelConfig)
class CrossEntropyGumbelCriterion(MoECrossEntropyCriterion):
    """`moe_cross_entropy` under the name that EvoMoE's code has for it without gate losses."""


@functools.cache
def _log_unchunked() -> None:
    logger.info("cross-entropy from the logits of all tokens at once: not an evomoe_plugin model")
