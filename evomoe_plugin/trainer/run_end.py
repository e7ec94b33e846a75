"""Whether a run that resumes has ended already."""

from __future__ import annotations

from typing import Any

from evomoe_plugin.trainer.early_stopping import EarlyStopping


def limit_reached(cfg: Any, updates: int, hours: float, stopping: EarlyStopping) -> str | None:
    """The option that ended the run, as given; None: it goes on.

    Args:
        cfg: fairseq's configuration.
        updates: completed.
        hours: of training, the same on all ranks.
        stopping: the state of `--patience`.
    """
    limits = cfg.optimization
    if 0 < limits.max_update <= updates:
        return f"--max-update {limits.max_update}"
    if 0 < limits.stop_time_hours < hours:
        return f"--stop-time-hours {limits.stop_time_hours}"
    if stopping.is_over(cfg.checkpoint):
        return f"--patience {cfg.checkpoint.patience}"
    return None
