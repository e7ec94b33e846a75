"""Samples that are too long for the model or the batch: counted, and too many of them refused."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from fairseq import utils
from fairseq.data import LMContextWindowDataset
from fairseq.distributed import utils as distributed_utils
from fairseq.tasks import FairseqTask

from evomoe_plugin.config.errors import RunFailed
from evomoe_plugin.patches.patch import Patch, always, wrapping

logger = logging.getLogger(__name__)

# Of the samples, and of their tokens: only most of a data set stands for it.
MOST_SKIPPED = 0.1


def _get_batch_iterator(upstream: Callable, task: FairseqTask, *args: Any, **kwargs: Any) -> Any:
    """As upstream; samples longer than `max_positions` or `max_tokens` are left out.

    Raises:
        RunFailed: none is left, or more than `MOST_SKIPPED` would be; any, where invalid inputs
            are not to be ignored (validation without --skip-invalid-size-inputs-valid-test).
    """
    given = inspect.signature(upstream).bind(task, *args, **kwargs)
    given.apply_defaults()
    asked = given.arguments
    dataset, tokens = asked["dataset"], asked["max_tokens"]
    sizes = getattr(dataset, "sizes", None)
    limit = utils.resolve_max_positions(asked["max_positions"], tokens)
    if (
        dataset in task.dataset_to_epoch_iter
        or not isinstance(limit, (int, float))
        or not isinstance(sizes, np.ndarray)
        or sizes.ndim > 1
    ):
        return upstream(task, *args, **kwargs)
    # Rows of a context window have tokens of other samples too.
    own = dataset.dataset.sizes if isinstance(dataset, LMContextWindowDataset) else sizes
    remedy = _remedy(task, sizes, limit, limit == tokens)
    _check(sizes > limit, own, limit, remedy, asked["ignore_invalid_inputs"])
    asked["max_positions"] = limit
    return upstream(*given.args, **given.kwargs)


def _check(
    too_long: np.ndarray, sizes: np.ndarray, limit: float, remedy: str, may_skip: bool
) -> None:
    samples, tokens = len(sizes), int(sizes.sum(dtype=np.int64))
    if not tokens:
        raise RunFailed("the data set has no token: give another one")
    skipped, left_out = int(too_long.sum()), int(sizes[too_long].sum(dtype=np.int64))
    if not skipped:
        return
    counts = (
        f"{skipped:,} of {samples:,} samples, with {left_out:,} of {tokens:,} tokens, are longer "
        f"than {limit:,} tokens"
    )
    if max(skipped / samples, left_out / tokens) > MOST_SKIPPED:
        raise RunFailed(
            f"{counts}; at most {MOST_SKIPPED:.0%} of a data set may be left out: {remedy}"
        )
    if not may_skip:
        raise RunFailed(
            f"{counts}: {remedy}, or leave them out by --skip-invalid-size-inputs-valid-test"
        )
    if distributed_utils.get_global_rank() == 0:
        logger.warning("%s and are left out", counts)


def _remedy(task: FairseqTask, sizes: np.ndarray, limit: float, of_batch: bool) -> str:
    if of_batch:
        return f"give --max-tokens {sizes.max()} or more"
    options = getattr(task, "args", task.cfg)
    if str(getattr(options, "sample_break_mode", None) or "none") != "none":
        return (
            "give --sample-break-mode none, which divides documents, or --shorten-method truncate"
        )
    return f"give --tokens-per-sample {limit} or less, the model's positions"


PATCH = Patch(
    name="skipped-samples",
    broken="samples that are longer than the model's positions or --max-tokens are left out, "
    "however many: fairseq-eval-lm prints the perplexity of the rest, or 1.00 of nothing, and "
    "training goes on with what is left or ends in an IndexError",
    upstream="fairseq/tasks/fairseq_task.py: get_batch_iterator, filter_indices_by_size",
    remove_when="fairseq says what it leaves out, and refuses to leave out nearly everything",
    needed=always("a number is of the data it was asked for"),
    apply=wrapping(FairseqTask, get_batch_iterator=_get_batch_iterator),
)
