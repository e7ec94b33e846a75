"""Cross-entropy plus the weighted auxiliary losses of the gates."""

# No `from __future__ import annotations`: fairseq reads the types of the dataclass at run time.

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from fairseq import utils
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.logging import metrics
from torch import Tensor

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import flag
from evomoe_plugin.routing import stats as st

logger = logging.getLogger(__name__)

_STATS = "moe_stats_"
_AUX = "moe_aux_"
_AUX_TOKENS = "moe_tokens_of_aux"


@dataclass
class MoECrossEntropyCriterionConfig(CrossEntropyCriterionConfig):
    """Options with the names and meanings of fairseq's moe branch."""

    moe_gate_loss_wt: float = flag(1.0, "weight of the gates' auxiliary losses in the loss")
    moe_gate_loss_combine_method: str = flag(
        "average", "how the auxiliary losses of MoE layers are combined: average or sum"
    )
    moe_vocab_chunk: Optional[int] = flag(
        None,
        "number of tokens whose logits are computed at a time (default: 512 on a CPU, 4096 on a "
        "GPU); 0: all, as in fairseq",
    )
    moe_stability_tokens: int = flag(
        4096,
        "first tokens of each validation set whose routing is compared from one validation to the "
        "next; 0: none",
    )


@register_criterion("moe_cross_entropy", dataclass=MoECrossEntropyCriterionConfig)
class MoECrossEntropyCriterion(CrossEntropyCriterion):
    """loss = cross-entropy + weight * sample size * sum of coefficient * combined auxiliary loss.

    An auxiliary loss is a mean over the tokens of a micro-batch. Where a micro-batch's sample size
    is not its number of tokens (prompts that are no targets, token weights, --sentence-avg), the
    means are weighed by tokens, with the ratio of both in the whole update: the loss of an update
    does not depend on how it is divided into micro-batches and ranks.

    In evaluation the auxiliary losses are logged but not added. Perplexity is always that of the
    cross-entropy.
    """

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
        if moe_gate_loss_combine_method not in ("average", "sum"):
            raise OptionError(
                "moe_gate_loss_combine_method", moe_gate_loss_combine_method, "one of: average, sum"
            )
        if not (math.isfinite(moe_gate_loss_wt) and moe_gate_loss_wt >= 0):
            raise OptionError("moe_gate_loss_wt", moe_gate_loss_wt, "give a weight of 0 or more")
        if moe_vocab_chunk is not None and moe_vocab_chunk < 0:
            raise OptionError(
                "moe_vocab_chunk", moe_vocab_chunk, "give a number of tokens, or 0 for all at once"
            )
        if moe_stability_tokens < 0:
            raise OptionError(
                "moe_stability_tokens",
                moe_stability_tokens,
                "give a number of tokens, or 0 for none",
            )
        self.vocab_chunk = moe_vocab_chunk
        self.stability_tokens = moe_stability_tokens
        self._counts_tokens = sentence_avg or getattr(task, "has_context", False)
        self._size_per_token = 1.0  # in the current update
        self.gate_loss_weight = moe_gate_loss_wt
        self.combine_method = moe_gate_loss_combine_method

    def begin_update(
        self, samples: Sequence[dict[str, Any]], total: Callable[[Tensor], Tensor]
    ) -> None:
        """Called with the micro-batches of an update, on every rank, before they are trained on.

        Args:
            total: the sum of a tensor over all ranks.
        """
        if not self._counts_tokens or self.gate_loss_weight == 0:
            return
        sizes = [(self._sample_size(s), float(self._num_tokens(s))) for s in samples if s]
        rank = torch.tensor(sizes, dtype=torch.float64).reshape(-1, 2).sum(0)
        size, tokens = total(rank).tolist()
        self._size_per_token = size / tokens if tokens else 1.0

    def _sample_size(self, sample: dict[str, Any]) -> int:
        return sample["target"].size(0) if self.sentence_avg else sample["ntokens"]

    def _num_tokens(self, sample: dict[str, Any]) -> Tensor:
        """The sum of the weights that the gates' means are taken with."""
        keep = sample["net_input"]["src_tokens"] != self.padding_idx
        weights = sample["net_input"].get("token_weights")
        return keep.sum() if weights is None else (weights * keep).sum()

    def forward(self, model, sample, reduce: bool = True) -> tuple[Tensor, Any, dict[str, Any]]:
        """Loss of one batch.

        Returns:
            the loss, summed over tokens; the sample size to divide it by; the logging output: sums
            that may be added over batches and ranks; and `moe_token_routing` if the batch asks the
            model for it, which the trainer takes out before.
        """
        inner_loss, extra = self._cross_entropy(model, sample, reduce)
        sample_size = self._sample_size(sample)
        tokens = self._num_tokens(sample) if self._counts_tokens else sample_size
        logging_output = {
            "inner_loss": inner_loss.detach(),
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }
        loss = inner_loss
        for name, aux_L in extra.get("moe_aux", {}).items():
            combined = aux_L.mean() if self.combine_method == "average" else aux_L.sum()
            weight = self.gate_loss_weight * extra["moe_aux_coefficients"][name]
            if self.training and weight > 0:
                loss = loss + weight * self._size_per_token * tokens * combined.to(loss.dtype)
            logging_output[_AUX + name] = combined.detach() * tokens
            logging_output[_AUX_TOKENS] = tokens
        logging_output["loss"] = loss.detach()
        if "moe_stats" in extra:
            logging_output.update({_STATS + k: v for k, v in extra["moe_stats"].items()})
            logging_output["moe_flops"] = self._forward_flops(model, extra["moe_stats"])
        if "moe_token_routing" in extra:
            logging_output["moe_token_routing"] = extra["moe_token_routing"]
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
    def _forward_flops(model, moe_stats: dict[str, Tensor]) -> Tensor:
        flops = model.forward_flops
        tokens = moe_stats[st.TOKENS].max()  # the same in every layer
        return flops.per_token * tokens + flops.per_pair * moe_stats[st.PAIRS].sum()

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Log loss, inner_loss (both base 2), ppl, gate losses and routing statistics."""

        def total(key: str) -> Any:
            return sum(log[key] for log in logging_outputs if key in log)

        sample_size, ntokens = total("sample_size"), total("ntokens")
        loss, inner_loss = total("loss"), total("inner_loss")
        metrics.log_scalar("loss", loss / sample_size / math.log(2), sample_size, round=3)
        metrics.log_scalar("inner_loss", inner_loss / ntokens / math.log(2), ntokens, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["inner_loss"].avg))
        keys = {key for log in logging_outputs for key in log}
        for key in sorted(keys):
            if key.startswith(_AUX):
                name = "gate_loss_" + key[len(_AUX) :]
                tokens = total(_AUX_TOKENS)
                metrics.log_scalar(name, total(key) / tokens, tokens, round=4)
        stats = {key[len(_STATS) :]: total(key) for key in sorted(keys) if key.startswith(_STATS)}
        if not stats or not torch.as_tensor(stats[st.TOKENS]).any():
            return
        for name, value in st.summarize(stats).items():
            # A coefficient may start at 1e-8.
            digits = None if name == st.COEFFICIENT else 4
            metrics.log_scalar(name, value, ntokens, round=digits)
        # Not ntokens, which counts target tokens only.
        tokens = float(torch.as_tensor(stats[st.TOKENS]).max())
        flops = float(total("moe_flops"))
        metrics.log_scalar("mflops_per_token", flops / tokens / 1e6, ntokens, round=3)


@functools.cache
def _log_unchunked() -> None:
    logger.info("cross-entropy from the logits of all tokens at once: not an evomoe_plugin model")
