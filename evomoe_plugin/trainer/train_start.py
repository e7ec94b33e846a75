"""What happens where a run begins without a checkpoint: models can get other first weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fairseq.trainer import Trainer

from evomoe_plugin.patches.patch import Patch, always, wrap

_callbacks: list[Callable[[Trainer], None]] = []


def at_train_start(callback: Callable[[Trainer], None]) -> None:
    """Have `callback(trainer)` called on every rank of a run that found no checkpoint to go on
    from, before its first update."""
    if callback not in _callbacks:
        _callbacks.append(callback)


def _load_checkpoint(upstream: Callable, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    extra_state = upstream(trainer, *args, **kwargs)
    if extra_state is None:
        for callback in _callbacks:
            callback(trainer)
    return extra_state


@functools.cache
def apply() -> None:
    wrap(Trainer, "load_checkpoint", _load_checkpoint)


PATCH = Patch(
    name="train-start",
    broken="nothing tells whether a run begins anew or goes on, so that first weights from "
           "elsewhere would be read, and need be there, after every restart and in evaluation",
    upstream="fairseq/trainer.py: load_checkpoint",
    remove_when="fairseq calls its task or model before the first update of a run",
    needed=always("experts can be made from a dense model at the start"),
    apply=apply,
)
