"""A checkpoint of a run before its first update: weights without optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def initial_checkpoint(
    cfg: dict[str, Any], weights: Mapping[str, Tensor], *, criterion: str
) -> dict[str, Any]:
    """What fairseq would save before the first update.

    Args:
        cfg: the run's configuration, a plain dictionary.
        weights: the model's state dict.
        criterion: class name of the run's criterion.
    """
    return {
        "args": None,
        "cfg": cfg,
        "model": weights,
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": criterion,
                "optimizer_name": "none",
                "lr_scheduler_state": {},
                "num_updates": 0,
            }
        ],
        "task_state": {},
        "extra_state": {
            "metrics": [],
            "previous_training_time": 0.0,
            "train_iterator": {"version": 2, "epoch": 1, "iterations_in_epoch": 0, "shuffle": True},
        },
        "last_optimizer_state": None,
    }
