"""Auxiliary losses and statistics of MoE layers, for criterions of every task."""

# No `from __future__ import annotations`: fairseq reads the types of the dataclass at run time.

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from fairseq import utils
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import flag
from evomoe_plugin.routing import stats as st

_AUX = "moe_aux_"
_AUX_TOKENS = "moe_tokens_of_aux_"


@dataclass
class GateLossOptions(FairseqDataclass):
    """The first two have the names and meanings of fairseq's moe branch."""

    moe_gate_loss_wt: float = flag(1.0, "weight of the gates' auxiliary losses in the loss")
    moe_gate_loss_combine_method: str = flag(
        "average", "how the auxiliary losses of MoE layers are combined: average or sum"
    )
    moe_stability_tokens: int = flag(
        4096,
        "first tokens of each validation set whose routing is compared from one validation to the "
        "next; 0: none",
    )


class GateLosses:
    """Criterions inherit this before fairseq's class.

    loss = task loss + weight * sample size * sum of coefficient * combined auxiliary loss.

    An auxiliary loss is a mean over the tokens of a micro-batch. Where a micro-batch's sample size
    is not its number of tokens (masked tokens, prompts that are no targets, token weights, source
    sentences, --sentence-avg), the means are weighed by tokens, with the ratio of both in the whole
    update: the loss of an update does not depend on how it is divided into micro-batches and ranks.

    In evaluation the auxiliary losses are logged but not added.
    """

    # Of fairseq's class.
    padding_idx: int
    training: bool

    counts_tokens = True
    """Whether sample sizes may differ from numbers of tokens."""
    computes_targets = True
    """Whether logits over the vocabulary are computed, for as many tokens as the sample size."""

    def set_gate_losses(self, weight: float, combine_method: str, stability_tokens: int) -> None:
        """Set the options; called by constructors.

        Raises:
            OptionError: one of them is invalid.
        """
        if combine_method not in ("average", "sum"):
            raise OptionError(
                "moe_gate_loss_combine_method", combine_method, "one of: average, sum"
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise OptionError("moe_gate_loss_wt", weight, "give a weight of 0 or more")
        if stability_tokens < 0:
            raise OptionError(
                "moe_stability_tokens", stability_tokens, "give a number of tokens, or 0 for none"
            )
        self.stability_tokens = stability_tokens
        self.gate_loss_weight = weight
        self.combine_method = combine_method
        self._size_per_token = dict.fromkeys(st.STACKS, 1.0)  # in the current update

    def sample_size(self, sample: dict[str, Any]) -> Any:
        """What the loss of a batch is divided by."""
        raise NotImplementedError

    def begin_update(
        self, samples: Sequence[dict[str, Any]], total: Callable[[Tensor], Tensor]
    ) -> None:
        """Called with the micro-batches of an update, on every rank, before they are trained on.

        Args:
            total: the sum of a tensor over all ranks.
        """
        if not self.counts_tokens or self.gate_loss_weight == 0:
            return
        sums = torch.zeros(1 + len(st.STACKS), dtype=torch.float64)
        for sample in filter(None, samples):
            tokens = self._tokens(sample)
            counts = [self.sample_size(sample), *(tokens.get(stack, 0) for stack in st.STACKS)]
            sums += torch.tensor([float(count) for count in counts], dtype=torch.float64)
        size, *of_stacks = total(sums).tolist()
        for stack, tokens in zip(st.STACKS, of_stacks, strict=True):
            self._size_per_token[stack] = size / tokens if tokens else 1.0

    def _tokens(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        """The sum of the weights that the gates' means are taken with, of each stack."""
        given = sample["net_input"]
        if "prev_output_tokens" in given:
            names = {"encoder_": "src_tokens", "decoder_": "prev_output_tokens"}
            return {stack: (given[name] != self.padding_idx).sum() for stack, name in names.items()}
        keep, weights = given["src_tokens"] != self.padding_idx, given.get("token_weights")
        return {"": keep.sum() if weights is None else (weights * keep).sum()}

    def add_gate_losses(
        self,
        inner_loss: Tensor,
        model: Any,
        sample: dict[str, Any],
        extra: dict[str, Any],
        logging_output: dict[str, Any],
    ) -> Tensor:
        """The loss with auxiliary losses.

        Args:
            inner_loss: of the task.
            extra: the second output of the model.
            logging_output: gets `inner_loss`, `loss`, what `log_routing` logs, and
                `moe_token_routing` if the batch asked the model for it, which the trainer takes
                out before.
        """
        loss = inner_loss
        size, aux = logging_output["sample_size"], extra.get("moe_aux", {})
        tokens = self._tokens(sample) if self.counts_tokens else {"": size}
        layers: dict[str, int] = {}  # by the loss, in all stacks
        for name, aux_L in aux.items():
            base = name.removeprefix(st.stack_of(name))
            layers[base] = layers.get(base, 0) + len(aux_L)
        for name, aux_L in aux.items():
            stack = st.stack_of(name)
            combined, share = aux_L.sum(), 1.0
            if self.combine_method == "average":
                combined = aux_L.mean()
                share = len(aux_L) / layers[name.removeprefix(stack)]
            weight = self.gate_loss_weight * extra["moe_aux_coefficients"][name] * share
            if self.training and weight > 0:
                size_of_aux = self._size_per_token[stack] * tokens[stack]
                loss = loss + weight * size_of_aux * combined.to(loss.dtype)
            logging_output[_AUX + name] = combined.detach() * tokens[stack]
            logging_output[_AUX_TOKENS + stack] = tokens[stack]
        logging_output["inner_loss"] = inner_loss.detach()
        logging_output["loss"] = loss.detach()
        if "moe_token_routing" in extra:
            logging_output["moe_token_routing"] = extra["moe_token_routing"]
        if "moe_stats" in extra:
            stats = extra["moe_stats"]
            logging_output.update({st.LOGGED + name: value for name, value in stats.items()})
            for stack, flops in model.forward_flops.items():
                if stack + st.TOKENS in stats:
                    of_tokens = flops.per_token * stats[stack + st.TOKENS].max()  # of any layer
                    of_pairs = flops.per_pair * stats[stack + st.PAIRS].sum()
                    of_targets = flops.per_target * size if self.computes_targets else 0
                    logging_output[st.FLOPS + stack] = of_tokens + of_pairs + of_targets
        return loss


@dataclass
class VocabChunkOptions(FairseqDataclass):
    """How losses over the vocabulary are computed."""

    moe_vocab_chunk: Optional[int] = flag(
        None,
        "number of tokens whose logits are computed at a time (default: 512 on a CPU, 4096 on a "
        "GPU); 0: all, as in fairseq",
    )


def check_vocab_chunk(chunk: int | None) -> int | None:
    """Raise `OptionError` for a negative number."""
    if chunk is not None and chunk < 0:
        raise OptionError("moe_vocab_chunk", chunk, "give a number of tokens, or 0 for all at once")
    return chunk


class GateLossesOfFairseq(GateLosses):
    """Gate losses for a criterion whose forward pass is fairseq's."""

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> tuple[Tensor, Any, dict]:
        """Loss of one batch: summed over what the sample size counts; the latter; sums to log."""
        recorded = Recorded(model)
        inner_loss, size, logging_output = super().forward(  # type: ignore[misc]
            recorded, sample, reduce
        )
        loss = self.add_gate_losses(inner_loss, model, sample, recorded.extra, logging_output)
        return loss, size, logging_output


class Recorded:
    """A model that keeps the second output of its forward pass, for criterions of fairseq that drop
    it."""

    def __init__(self, model: Any):
        self._model = model
        self.extra: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._model(*args, **kwargs)
        self.extra = output[1]
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def log_routing(logging_outputs: Sequence[dict[str, Any]]) -> None:
    """Log gate losses and routing statistics of each stack."""
    ntokens = _total(logging_outputs, "ntokens")
    keys = sorted({key for log in logging_outputs for key in log})
    for key in keys:
        if key.startswith(_AUX):
            name = key.removeprefix(_AUX)
            stack = st.stack_of(name)
            tokens = _total(logging_outputs, _AUX_TOKENS + stack)
            mean = _total(logging_outputs, key) / tokens
            metrics.log_scalar(
                f"{stack}gate_loss_{name.removeprefix(stack)}", mean, tokens, round=4
            )
    flops_of_stacks = {}
    for stack, stats in st.totals(logging_outputs).items():
        if not torch.as_tensor(stats[st.TOKENS]).any():
            continue
        for name, value in st.summarize(stats).items():
            # A coefficient may start at 1e-8.
            digits = None if name == st.COEFFICIENT else 4
            metrics.log_scalar(stack + name, value, ntokens, round=digits)
        # Not ntokens, which counts target tokens only.
        tokens = float(torch.as_tensor(stats[st.TOKENS]).max())
        flops = flops_of_stacks[stack] = float(_total(logging_outputs, st.FLOPS + stack))
        metrics.log_scalar(f"{stack}mflops_per_token", flops / tokens / 1e6, ntokens, round=3)
    if flops_of_stacks and "" not in flops_of_stacks:
        mflops = sum(flops_of_stacks.values()) / float(ntokens) / 1e6
        metrics.log_scalar("mflops_per_token", mflops, ntokens, round=3)


def log_language_model(logging_outputs: Sequence[dict[str, Any]], size: str) -> None:
    """Log loss, inner_loss (both base 2), ppl, gate losses and routing statistics.

    Args:
        size: the logging output that counts the predicted tokens.
    """
    log_loss(logging_outputs)
    log_inner_loss(logging_outputs, size)
    metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["inner_loss"].avg))
    log_routing(logging_outputs)


def log_inner_loss(logging_outputs: Sequence[dict[str, Any]], size: str) -> None:
    """Log `inner_loss`, base 2, per unit of the logging output `size`."""
    count = _total(logging_outputs, size)
    inner_loss = _total(logging_outputs, "inner_loss")
    metrics.log_scalar("inner_loss", inner_loss / count / math.log(2), count, round=3)


def log_loss(logging_outputs: Sequence[dict[str, Any]]) -> None:
    """Log `loss`, base 2, with gate losses in training."""
    size = _total(logging_outputs, "sample_size")
    loss = _total(logging_outputs, "loss")
    metrics.log_scalar("loss", loss / size / math.log(2), size, round=3)


def _total(logging_outputs: Sequence[dict[str, Any]], key: str) -> Any:
    return sum(log[key] for log in logging_outputs if key in log)
