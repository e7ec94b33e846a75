"""What a rank does after an exception: it dies, so that the others can."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from fairseq.trainer import Trainer

from evomoe_plugin.compat.errors import RunFailed
from evomoe_plugin.compat.mend import Mend, always

logger = logging.getLogger(__name__)

upstream_consolidate = Trainer.consolidate_optimizer
upstream_save = Trainer.save_checkpoint


def consolidate_optimizer(self: Trainer) -> None:
    """As upstream, but not in the midst of an exception that other ranks may not have met."""
    if sys.exc_info()[0] is None or self.data_parallel_world_size == 1:
        upstream_consolidate(self)


def save_checkpoint(self: Trainer, filename: str, extra_state: dict) -> Any:
    if os.path.basename(filename) != "crash.pt":
        return upstream_save(self, filename, extra_state)
    if self.data_parallel_world_size > 1:
        logger.error("no crash.pt: with several processes it would need them all; "
                     "the last checkpoint is intact")
        return None
    try:
        return upstream_save(self, filename, extra_state)
    except RunFailed as error:  # must not hide what we are crashing from
        logger.error("no crash.pt: %s", error)
        return None


def apply() -> None:
    Trainer.consolidate_optimizer = consolidate_optimizer
    Trainer.save_checkpoint = save_checkpoint


MEND = Mend(
    name="crash",
    broken="an exception in one rank makes it wait for the others, to write crash.pt together; "
           "they wait for it in the next step, and the run hangs",
    upstream="fairseq/trainer.py: train_step",
    remove_when="fairseq writes crash.pt without collectives, or not at all",
    needed=always("a rank that fails ends the run"),
    apply=apply,
)
