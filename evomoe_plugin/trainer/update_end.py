"""Models learn that an update has ended: what all of it routed, on all ranks, is then known."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer

from evomoe_plugin.patches.patch import Patch, always, wrap

_callbacks: list[Callable[[Trainer], None]] = []
_surroundings: list[Callable[[Trainer], contextlib.AbstractContextManager[None]]] = []

# What surrounds the update that is under way in this thread.
_under_way: ContextVar[contextlib.ExitStack | None] = ContextVar("under_way", default=None)


def after_update(callback: Callable[[Trainer], None]) -> None:
    """Have `callback(trainer)` called on every rank after each update, once the model's own
    `finish_update` is through and before anything is logged or saved."""
    if callback not in _callbacks:
        _callbacks.append(callback)


def around_update(
    surrounding: Callable[[Trainer], contextlib.AbstractContextManager[None]]
) -> None:
    """Have each update made inside of `surrounding(trainer)`, on every rank. It has been left when
    `after_update` calls, and whenever the trainer's state is asked for."""
    if surrounding not in _surroundings:
        _surroundings.append(surrounding)


def _update(upstream: Callable, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    if _under_way.get() is not None:  # a batch that --amp repeats
        return upstream(trainer, *args, **kwargs)
    with contextlib.ExitStack() as stack:
        for surrounding in _surroundings:
            stack.enter_context(surrounding(trainer))
        token = _under_way.set(stack)
        try:
            return upstream(trainer, *args, **kwargs)
        finally:
            _under_way.reset(token)


def _state_dict(upstream: Callable, trainer: Trainer) -> Any:
    """Of an update that fails: crash.pt holds what any checkpoint does."""
    stack = _under_way.get()
    if stack is not None:
        stack.close()
    return upstream(trainer)


def _trainer_step(upstream: Callable, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    before = trainer.get_num_updates()
    logged = _update(upstream, trainer, *args, **kwargs)
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
    wrap(Trainer, "state_dict", _state_dict)
    wrap(FairseqTask, "train_step", _task_step)


PATCH = Patch(
    name="update-end",
    broken="nothing tells a model that an update has ended, so that gates which learn from their "
           "load would have to do so in the forward pass, once a micro-batch and rank",
    upstream="fairseq/trainer.py: train_step",
    remove_when="fairseq calls its model after each update",
    needed=always("gates learn from the load of whole updates"),
    apply=apply,
)
