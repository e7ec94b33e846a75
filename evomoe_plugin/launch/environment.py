"""Detect what launched this process, and how many ranks, from the environment."""

from __future__ import annotations

import os
from typing import Any


def started_by_torchrun() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process."""
    return all(name in os.environ for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"))


def is_slurm_task(options: Any) -> bool:
    """Whether this is one of several Slurm tasks that find each other by Slurm's variables.

    Args:
        options: the run's, of `distributed_training`.
    """
    return options.distributed_init_method is None and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def process_count(options: Any) -> int:
    """The number of ranks: of `--distributed-world-size`, or of the launcher."""
    count = options.distributed_world_size
    if started_by_torchrun():
        return max(count, int(os.environ["WORLD_SIZE"]))
    if is_slurm_task(options):
        return max(count, int(os.environ["SLURM_NTASKS"]))
    return count
