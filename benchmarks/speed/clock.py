"""Time of alternating steps, and memory of one."""

from __future__ import annotations

import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

SLOW, FEW = 20, 3
"""Steps that take more than SLOW times the bound are measured in FEW rounds."""


def seconds(step: Callable[[], object], device: str) -> float:
    """Wall time of a step, including the device's work."""
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def take_turns(
    steps: Mapping[str, Callable[[], object]], rounds: int, device: str, bound: str
) -> dict[str, list[float | None]]:
    """Seconds of each step in each round, in a new order every round, after a warm-up round.

    Args:
        bound: the step that defines which steps are slow.
    Returns:
        Name -> one value per round, None where a slow step was skipped.
    """
    warm = {name: seconds(step, device) for name, step in steps.items()}
    few = {name for name, taken in warm.items() if taken > SLOW * warm[bound]}
    times: dict[str, list[float | None]] = {name: [] for name in steps}
    for round_ in range(rounds):
        order = sorted(steps)
        random.Random(round_).shuffle(order)
        for name in order:
            skipped = name in few and round_ >= FEW
            times[name].append(None if skipped else seconds(steps[name], device))
    return times


def ratios(times: Sequence[float | None], bound: Sequence[float | None]) -> list[float]:
    """Time over the bound's in the same round."""
    return [t / b for t, b in zip(times, bound, strict=True) if t is not None and b is not None]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum, maximum, quartiles."""
    ordered = sorted(values)
    low, _, high = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else ordered * 3
    return {
        "median": statistics.median(ordered),
        "min": ordered[0],
        "max": ordered[-1],
        "low": low,
        "high": high,
        "rounds": len(ordered),
    }


class Peak:
    """Additional MiB while the block runs, of the process or the CUDA device."""

    def __init__(self, device: str):
        self.device = device
        self.mib = 0.0

    def __enter__(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak
            self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_):
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.mib = torch.cuda.max_memory_allocated() / 2**20 - self._before
        else:
            self.mib = _resident("VmHWM") - self._before


def _resident(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.M).group(1)) / 1024


def free_gibibytes(device: str) -> float:
    """Available memory."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**30
    info = Path("/proc/meminfo").read_text()
    return int(re.search(r"^MemAvailable:\s+(\d+) kB", info, re.M).group(1)) / 2**20
