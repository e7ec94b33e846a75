"""The model learns the number of updates when it changes, not at the next training step."""

from __future__ import annotations

from typing import Any

from fairseq.trainer import Trainer

from evomoe_plugin.compat.mend import Mend, always

upstream_set = Trainer.set_num_updates
upstream_load = Trainer.load_checkpoint


def _tell_model(trainer: Trainer) -> None:
    # The bare model: asking for the wrapped one would build the wrapper.
    model = trainer.get_model()
    if hasattr(model, "set_num_updates"):
        model.set_num_updates(trainer.get_num_updates())


def set_num_updates(self: Trainer, num_updates: int) -> None:
    upstream_set(self, num_updates)
    _tell_model(self)


def load_checkpoint(self: Trainer, *args: Any, **kwargs: Any) -> Any:
    """As upstream, but with --reset-optimizer, which starts at 0 again, so does the model."""
    extra_state = upstream_load(self, *args, **kwargs)
    _tell_model(self)
    return extra_state


def apply() -> None:
    Trainer.set_num_updates = set_num_updates
    Trainer.load_checkpoint = load_checkpoint


MEND = Mend(
    name="num-updates",
    broken="validation during training sees a schedule one update behind what fairseq-eval-lm "
           "sees in the checkpoint written at that moment",
    upstream="fairseq/trainer.py: set_num_updates tells the scheduler only",
    remove_when="fairseq calls model.set_num_updates there",
    needed=always("schedules follow the update number"),
    apply=apply,
)
