"""Have fairseq's commands train with `MoETrainer`, and save with `checkpoint.save`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairseq import checkpoint_utils
from fairseq.data import iterators
from fairseq.trainer import Trainer

from evomoe_plugin.checkpoint.save import save_checkpoint
from evomoe_plugin.trainer.data_wait import TimedGroupedIterator
from evomoe_plugin.trainer.moe_trainer import MoETrainer


def install(main: Callable[..., Any]) -> None:
    """Replace the classes and functions that fairseq's `main` looks up by name.

    Args:
        main: of a command of fairseq, in the process that runs it.
    """
    if main.__globals__.get("Trainer") is Trainer:
        main.__globals__["Trainer"] = MoETrainer
    checkpoint_utils.save_checkpoint = save_checkpoint
    iterators.GroupedIterator = TimedGroupedIterator
