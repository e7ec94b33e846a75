"""What is logged of an update's speed."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fairseq.logging import metrics

from evomoe_plugin.routing import stats as st
from evomoe_plugin.trainer.peak_flops import peak_flops

_BACKWARD = 2  # FLOPs of a backward pass, in forward passes


class SpeedLog:
    """Logs TFLOPS, the share of the device's peak, memory, and the time that is left.

    Args:
        device: of this rank; all ranks have the same kind.
        dtype: of matmuls.
        ranks: number of devices.
        peak_tflops: of a device; None: known or measured (`trainer.peak_flops`).
        max_update: length of the run; 0: unknown.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        ranks: int,
        peak_tflops: float | None,
        max_update: int,
    ):
        self._ranks, self._max_update = ranks, max_update
        self._peak = 1e12 * peak_tflops if peak_tflops else peak_flops(device, dtype)
        self._first: tuple[int, float] | None = None  # update, and when it ended

    def log_rate(self, logging_outputs: Sequence[Mapping[str, Any]], seconds: float) -> None:
        """Log the speed of an update.

        Args:
            logging_outputs: of the update, on all ranks.
            seconds: of the update, with waiting for its batches.
        """
        forward = [
            flops
            for output in logging_outputs
            for name, flops in output.items()
            if name.startswith(st.FLOPS)
        ]
        if forward and seconds:
            rate = (1 + _BACKWARD) * sum(forward) / self._ranks / seconds
            # Weighed by time, the mean of an interval is its FLOPs by its seconds.
            metrics.log_scalar("tflops", rate / 1e12, seconds, priority=1480, round=4)
            if self._peak:
                metrics.log_scalar("mfu", rate / self._peak, seconds, priority=1481, round=4)

    def log_left(self, num_updates: int) -> None:
        """Log the time that is left after `num_updates` completed ones."""
        now = time.perf_counter()
        if self._first is None:
            self._first = num_updates, now
        elif self._max_update:
            update, then = self._first
            left = (self._max_update - num_updates) * (now - then) / (num_updates - update)
            metrics.log_scalar("hours_left", left / 3600, weight=0, priority=1490, round=3)


def log_memory() -> None:
    """Log the most memory that this process has used since it started, in GiB."""
    used = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metrics.log_scalar("peak_gb", used / 2**30, weight=0, priority=1491, round=2)
