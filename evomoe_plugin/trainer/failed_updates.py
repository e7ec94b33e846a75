"""What is said and saved when an update fails."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from fairseq.distributed import utils as distributed_utils

from evomoe_plugin.config.errors import RunFailed
from evomoe_plugin.trainer.find_nan import first_not_finite

logger = logging.getLogger(__name__)


def log_overflowed_parameters(trainer: Any) -> None:
    """With `--debug-param-names --fp16-no-flatten-grads`."""
    if hasattr(trainer, "param_names") and hasattr(trainer.optimizer, "fp32_optimizer"):
        masters = trainer.optimizer.fp32_optimizer.params
        for master, name in zip(masters, trainer.param_names, strict=True):
            if master.grad is not None and not torch.isfinite(master.grad).all():
                logger.info("overflow in param %s", name)


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, of torch on the CPU, or of Python."""
    return isinstance(error, MemoryError) or any(
        text in str(error) for text in ("out of memory", "can't allocate memory")
    )


def others_wait(trainer: Any) -> bool:
    """Whether there are other ranks: one that leaves out a batch would miss exchanges of gradients,
    of shards, of experts' rows or of what is logged, and they would wait."""
    return trainer.cfg.distributed_training.distributed_world_size > 1


_SMALLER_BATCHES = "--batch-size or --max-tokens, with a larger --update-freq"
SMALLER_VALID_BATCHES = "--batch-size-valid or --max-tokens-valid"


def out_of_memory(
    trainer: Any, where: str = "on a batch", smaller: str = _SMALLER_BATCHES
) -> RunFailed:
    """The end of a run whose rank has no memory left.

    Args:
        smaller: the options whose values are too large.
    """
    rank = f"{_rank()} " if others_wait(trainer) else ""
    return RunFailed(
        f"{rank}ran out of memory {where} after update {trainer.get_num_updates()}: give a smaller "
        f"{smaller}; the last checkpoint, if any, is intact"
    )


def on_rank(trainer: Any, error: RunFailed) -> RunFailed:
    """`error` of NaN/Inf, with the rank where there are others, and that there is no crash.pt."""
    if not others_wait(trainer):
        return error
    return RunFailed(f"{_rank()}: {error}; several ranks write no crash.pt")


def _rank() -> str:
    return f"rank {distributed_utils.get_global_rank()}"


# Seconds for which a rank with nothing to tell lets another one end first, and say why.
_PATIENCE = 5.0


def not_finite(trainer: Any, error: FloatingPointError, samples: Sequence[Any]) -> RunFailed:
    """The end of a run with NaN/Inf; its batches are run again, to name where it begins.

    After the exchange of gradients all ranks have it: one whose batches do not waits for the
    others to end.
    """

    def run() -> None:
        for sample in samples:
            sample, _ = trainer._prepare_sample(sample)
            trainer.task.train_step(
                sample,
                trainer.model,
                trainer.criterion,
                trainer.optimizer,
                trainer.get_num_updates(),
                ignore_grad=False,
                **trainer.ema_arguments,
            )

    trainer.zero_grad()
    try:
        first = first_not_finite(trainer.get_model(), run)
    except RunFailed as found:  # the model's own check
        return on_rank(trainer, found)
    if first is None and others_wait(trainer):
        time.sleep(_PATIENCE)
    where = f"first in {first}" if first else "but not when the same batches are run again"
    message = str(error).split("\n")[0]
    return on_rank(
        trainer,
        RunFailed(
            f"update {trainer.get_num_updates() + 1}: {message}, {where}; the last checkpoint, if "
            "any, is intact: go on with a smaller --lr, or with --clip-norm"
        ),
    )


def save_crash_checkpoint(trainer: Any) -> None:
    """Write crash.pt, if this rank can alone: the others may not have met the exception."""
    if trainer.data_parallel_world_size > 1:
        return
    trainer.layout.abandon_pass(trainer)
    try:
        trainer.save_checkpoint(os.path.join(trainer.cfg.checkpoint.save_dir, "crash.pt"), {})
    except RunFailed as error:  # must not hide the exception that is being handled
        logger.error("no crash.pt: %s", error)
