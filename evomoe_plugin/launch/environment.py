"""What started this process, and how many others, by the environment."""

from __future__ import annotations

import os
from typing import Any


def started_by_torchrun() -> bool:
    """Or by another launcher that sets the same variables."""
    return all(name in os.environ for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"))


def is_slurm_task(options: Any) -> bool:
    """Whether this is one of several tasks of Slurm that find each other by its variables.

    Args:
        options: the run's, of `distributed_training`.
    """
    return options.distributed_init_method is None and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def process_count(options: Any) -> int:
    """Processes of the run: those of `--distributed-world-size`, or of what started this one."""
    count = options.distributed_world_size
    if started_by_torchrun():
        return max(count, int(os.environ["WORLD_SIZE"]))
    if is_slurm_task(options):
        return max(count, int(os.environ["SLURM_NTASKS"]))
    return count
