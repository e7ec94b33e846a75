"""The model learns the number of updates when it changes, not at the next training step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fairseq.trainer import Trainer

from evomoe_plugin.patches.patch import Patch, always, wrap


def _tell_model(trainer: Trainer) -> None:
    # The bare model: asking for the wrapped one would build the wrapper.
    model = trainer.get_model()
    if hasattr(model, "set_num_updates"):
        model.set_num_updates(trainer.get_num_updates())


def _set_num_updates(upstream: Callable, trainer: Trainer, num_updates: int) -> None:
    upstream(trainer, num_updates)
    _tell_model(trainer)


def _load_checkpoint(upstream: Callable, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    """Where --reset-optimizer makes the trainer start at 0 again, so shall the model."""
    extra_state = upstream(trainer, *args, **kwargs)
    _tell_model(trainer)
    return extra_state


@functools.cache
def apply() -> None:
    wrap(Trainer, "set_num_updates", _set_num_updates)
    wrap(Trainer, "load_checkpoint", _load_checkpoint)


PATCH = Patch(
    name="num-updates",
    broken="validation during training sees a schedule one update behind what fairseq-eval-lm "
           "sees in the checkpoint written at that moment",
    upstream="fairseq/trainer.py: set_num_updates tells the scheduler only",
    remove_when="fairseq calls model.set_num_updates there",
    needed=always("schedules follow the update number"),
    apply=apply,
)
