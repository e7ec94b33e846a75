"""The loop of `fairseq-eval-lm`, in place of fairseq's.

Fairseq's prints the perplexity of each rank's share of the data, adds up in fp32, prints 1.00 where
there is no data and nan where the model is broken, and leaves out tokens of probability zero.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from fairseq import utils
from fairseq.data import Dictionary
from fairseq.sequence_scorer import SequenceScorer
from torch import Tensor, nn

from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.dispatch.joined_forwards import joined_forwards

logger = logging.getLogger("fairseq_cli.eval_lm")

# What marks a token as a part of a word that goes on, by --post-process.
_CONTINUES = {"subword_nmt": "@@", "@@ ": "@@"}


def eval_lm(
    models: Sequence[nn.Module],
    source_dictionary: Dictionary,
    batch_iterator: Iterable[dict[str, Any]],
    post_process: str | None = None,
    output_word_probs: bool = False,
    output_word_stats: bool = False,
    target_dictionary: Dictionary | None = None,
    softmax_batch: int = 0,
    remove_bos_token: bool = False,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Evaluate an ensemble on the data of all ranks.

    Args:
        models: on all ranks alike; their experts may be sharded over ranks.
        source_dictionary: names the tokens.
        batch_iterator: this rank's batches, any number of them; those without `net_input` pad it.
        post_process: "subword_nmt" or "@@ ": count words, not their parts; None: count tokens.
        output_word_probs: log the log-probability of each word, of one rank.
        output_word_stats: log how often and how probable each word was, of one rank.
        target_dictionary: None: the same.
        softmax_batch: most tokens of which logits are normalised at once; 0: all.
        remove_bos_token: samples begin with a token that is not scored.
        device: None: that of the model.
    Returns:
        fp64 scalars over all ranks, on each of them: `loss`, mean cross-entropy in bits, and
        `perplexity`, 2 to the loss.
    Raises:
        OptionError: unknown `post_process`.
        RunFailed: there is no token to evaluate, or a token's log-probability is NaN/Inf.
    """
    if post_process is not None and post_process not in _CONTINUES:
        raise OptionError("post_process", post_process, "give @@ or subword_nmt, or leave it out")
    device = device or next(models[0].parameters()).device
    scorer = SequenceScorer(target_dictionary or source_dictionary, softmax_batch)
    words = _Words(source_dictionary, _CONTINUES.get(post_process or ""))
    eos = torch.tensor([[source_dictionary.eos()]], device=device)
    stats: dict[str, Any] = {}
    total, count, tokens, seconds = 0.0, 0, 0, 0.0
    with contextlib.ExitStack() as joined, torch.no_grad():
        for model in models:
            model.eval()
            joined.enter_context(joined_forwards(model, functools.partial(model, eos)))
        for sample in batch_iterator:
            if "net_input" not in sample:
                continue
            began = time.perf_counter()
            sample = utils.move_to_cuda(sample, device=device)
            scored = [
                (hypothesis["tokens"], hypothesis["positional_scores"].double())
                for (hypothesis, *_) in scorer.generate(models, sample)
            ]
            if remove_bos_token:
                scored = [(tokens_T[1:], scores_T[1:]) for tokens_T, scores_T in scored]
            sums_B = torch.stack([scores_T.sum() for _, scores_T in scored]).cpu()
            seconds += time.perf_counter() - began
            if not sums_B.isfinite().all():
                bad = sample["id"][int((~sums_B.isfinite()).nonzero()[0])]
                raise RunFailed(
                    f"sample {int(bad)}: the model gives a token the probability 0 or NaN: use an "
                    "earlier checkpoint, or fp32"
                )
            total += float(sums_B.sum())
            tokens += sum(len(tokens_T) for tokens_T, _ in scored)
            count += sum(words.count(tokens_T) for tokens_T, _ in scored)
            if output_word_probs or output_word_stats:
                for number, (tokens_T, scores_T) in zip(sample["id"].tolist(), scored, strict=True):
                    found = list(words.scored(tokens_T.tolist(), scores_T.tolist()))
                    if output_word_probs:
                        line = "\t".join(f"{word} [{score:2f}]" for word, score, _ in found)
                        logger.info("%s %s", number, line)
                    _add(stats, found)
    total, count, tokens, seconds = _over_ranks(device, total, count, tokens, seconds)
    if not count:
        raise RunFailed("there is no token to evaluate: give another --gen-subset")
    speed = tokens / seconds if seconds else 0.0
    logger.info("Evaluated %s tokens in %.1fs (%.2f tokens/s)", f"{tokens:,}", seconds, speed)
    if output_word_stats:
        for word_stats in sorted(stats.values(), key=lambda s: s.count, reverse=True):
            logger.info(word_stats)
    loss = torch.tensor(-total / count / math.log(2), dtype=torch.float64)
    return {"loss": loss, "perplexity": 2**loss}


def _over_ranks(
    device: torch.device, total: float, count: int, tokens: int, seconds: float
) -> tuple[float, int, int, float]:
    """Sums over ranks; the longest time."""
    if not dist.is_initialized():
        return total, count, tokens, seconds
    # fp64 counts exactly up to 2^53.
    sums = torch.tensor([total, count, tokens], dtype=torch.float64, device=device)
    longest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return float(sums[0]), int(sums[1]), int(sums[2]), float(longest)


class _Words:
    """Words of tokens, which may be parts of them.

    Args:
        dictionary: names the tokens.
        marker: at the end of a part that goes on in the next token; None: every token is a word.
    """

    def __init__(self, dictionary: Dictionary, marker: str | None):
        self._dictionary, self._marker = dictionary, marker or ""
        self._parts = [
            token
            for token in range(len(dictionary))
            if marker is not None and dictionary[token].endswith(marker)
        ]
        self._parts_P = torch.tensor(self._parts, dtype=torch.int64)

    def count(self, tokens_T: Tensor) -> int:
        """Number of words; a part at the end counts as one."""
        if not self._parts:
            return len(tokens_T)
        parts_T = torch.isin(tokens_T[:-1], self._parts_P.to(tokens_T.device))
        return len(tokens_T) - int(parts_T.sum())

    def scored(
        self, tokens: Sequence[int], scores: Sequence[float]
    ) -> Iterator[tuple[str, float, bool]]:
        """Each word, its log-probability, and whether it has several parts."""
        word, total = "", 0.0
        for token, score in zip(tokens, scores, strict=True):
            text, total = self._dictionary[token], total + score
            if token in self._parts:
                word += text.removesuffix(self._marker)
            else:
                yield word + text, total, bool(word)
                word, total = "", 0.0


def _add(stats: dict[str, Any], found: Sequence[tuple[str, float, bool]]) -> None:
    """Add a sample's words to the statistics of each word and of the word after it."""
    from fairseq_cli.eval_lm import WordStat

    following = [score for _, score, _ in found[1:]] + [None]
    for (word, score, is_divided), after in zip(found, following, strict=True):
        stats.setdefault(word, WordStat(word, is_divided)).add(score, after)


def install() -> None:
    """Have fairseq's command evaluate so, in the modules that are imported already."""
    for name in ("fairseq_cli.eval_lm", "__main__", "__mp_main__"):
        _use_loop(vars(sys.modules.get(name, sys)))


def install_in(main: Callable[..., Any]) -> None:
    """Have fairseq's `main` evaluate so, in the process that runs it."""
    _use_loop(main.__globals__)


def _use_loop(names: dict[str, Any]) -> None:
    if {"eval_lm", "WordStat"} <= names.keys():
        names["eval_lm"] = eval_lm
