"""Have fairseq's commands train with `MoETrainer`, and save with `checkpoint.save`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from fairseq import checkpoint_utils
from fairseq.data import iterators
from fairseq.trainer import Trainer

from evomoe_plugin.checkpoint.save import save_checkpoint
from evomoe_plugin.trainer import early_stopping
from evomoe_plugin.trainer.data_wait import TimedGroupedIterator
from evomoe_plugin.trainer.moe_trainer import MoETrainer


def install() -> None:
    """Replace what fairseq's commands look up by name, in the modules that are imported already."""
    for name in ("fairseq_cli.train", "__main__", "__mp_main__"):
        _use_trainer(vars(sys.modules.get(name, sys)))
    checkpoint_utils.save_checkpoint = save_checkpoint
    iterators.GroupedIterator = TimedGroupedIterator


def install_in(main: Callable[..., Any]) -> None:
    """Have fairseq's `main` train with `MoETrainer`, in the process that runs it."""
    _use_trainer(main.__globals__)


def _use_trainer(names: dict[str, Any]) -> None:
    if names.get("Trainer") is Trainer:
        names["Trainer"] = MoETrainer
        names["should_stop_early"] = early_stopping.STATE.should_stop
