"""Models learn that an update has ended: what all of it routed, on all ranks, is then known."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer

from evomoe_plugin.compat.mend import Mend, always, wrap

_callbacks: list[Callable[[Trainer], None]] = []


def after_update(callback: Callable[[Trainer], None]) -> None:
    """Have `callback(trainer)` called on every rank after each update, once the model's own
    `finish_update` is through and before anything is logged or saved."""
    if callback not in _callbacks:
        _callbacks.append(callback)


def _trainer_step(upstream: Callable, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    before = trainer.get_num_updates()
    logged = upstream(trainer, *args, **kwargs)
    model = trainer.get_model()  # the bare one
    if not hasattr(model, "finish_update"):
        return logged
    if trainer.get_num_updates() == before:  # an overflow of fp16
        model.discard_update()
        return logged
    group = trainer.data_parallel_process_group if trainer.data_parallel_world_size > 1 else None
    model.finish_update(trainer.get_num_updates(), group)
    for callback in _callbacks:
        callback(trainer)
    return logged


def _task_step(upstream: Callable, task: FairseqTask, sample: Any, model: Any, *args: Any,
               **kwargs: Any) -> Any:
    """A rank that has run out of batches runs one again for company; it is not to be counted."""
    ignored = kwargs.get("ignore_grad", args[3] if len(args) > 3 else False)
    if ignored and hasattr(model, "not_recording"):
        with model.not_recording():
            return upstream(task, sample, model, *args, **kwargs)
    return upstream(task, sample, model, *args, **kwargs)


@functools.cache
def apply() -> None:
    wrap(Trainer, "train_step", _trainer_step)
    wrap(FairseqTask, "train_step", _task_step)


MEND = Mend(
    name="update-end",
    broken="nothing tells a model that an update has ended, so that gates which learn from their "
           "load would have to do so in the forward pass, once a micro-batch and rank",
    upstream="fairseq/trainer.py: train_step",
    remove_when="fairseq calls its model after each update",
    needed=always("gates learn from the load of whole updates"),
    apply=apply,
)
