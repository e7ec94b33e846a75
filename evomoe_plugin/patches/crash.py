"""What a rank does after an exception: it dies, so that the others can."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from fairseq.trainer import Trainer

from evomoe_plugin.config.errors import RunFailed
from evomoe_plugin.patches.patch import Patch, always, wrap

logger = logging.getLogger(__name__)


def _consolidate_optimizer(upstream: Callable, trainer: Trainer) -> None:
    """Not in the midst of an exception: the other ranks, whom it needs, may not have met it."""
    if sys.exc_info()[0] is None or trainer.data_parallel_world_size == 1:
        upstream(trainer)


def _save_checkpoint(upstream: Callable, trainer: Trainer, filename: str, extra: dict) -> Any:
    if os.path.basename(filename) != "crash.pt":
        return upstream(trainer, filename, extra)
    if trainer.data_parallel_world_size > 1:
        logger.error("no crash.pt: with several processes it would need them all; "
                     "the last checkpoint is intact")
        return None
    try:
        return upstream(trainer, filename, extra)
    except RunFailed as error:  # must not hide what we are crashing from
        logger.error("no crash.pt: %s", error)
        return None


@functools.cache
def apply() -> None:
    wrap(Trainer, "consolidate_optimizer", _consolidate_optimizer)
    wrap(Trainer, "save_checkpoint", _save_checkpoint)


PATCH = Patch(
    name="crash",
    broken="an exception in one rank makes it wait for the others, to write crash.pt together; "
           "they wait for it in the next step, and the run hangs",
    upstream="fairseq/trainer.py: train_step",
    remove_when="fairseq writes crash.pt without collectives, or not at all",
    needed=always("a rank that fails ends the run"),
    apply=apply,
)
