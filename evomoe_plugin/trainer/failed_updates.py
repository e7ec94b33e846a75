"""What is said and saved when an update fails."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from fairseq.nan_detector import NanDetector

from evomoe_plugin.config.errors import RunFailed

logger = logging.getLogger(__name__)


def log_overflowed_parameters(trainer: Any) -> None:
    """With `--debug-param-names --fp16-no-flatten-grads`."""
    if hasattr(trainer, "param_names") and hasattr(trainer.optimizer, "fp32_optimizer"):
        masters = trainer.optimizer.fp32_optimizer.params
        for master, name in zip(masters, trainer.param_names, strict=True):
            if master.grad is not None and not torch.isfinite(master.grad).all():
                logger.info("overflow in param %s", name)


def find_nan(trainer: Any, samples: Sequence[Any]) -> None:
    """Run the batches again, with hooks that name the module where NaN/Inf arises."""
    trainer.zero_grad()
    with NanDetector(trainer.get_model()):
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


def save_crash_checkpoint(trainer: Any) -> None:
    """Write crash.pt, if this rank can alone: the others may not have met the exception."""
    if trainer.data_parallel_world_size > 1:
        logger.error(
            "no crash.pt: with several ranks it would need them all; the last checkpoint is intact"
        )
        return
    try:
        trainer.save_checkpoint(os.path.join(trainer.cfg.checkpoint.save_dir, "crash.pt"), {})
    except RunFailed as error:  # must not hide the exception that is being handled
        logger.error("no crash.pt: %s", error)
