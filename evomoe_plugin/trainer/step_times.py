"""How long the parts of an update take."""

from __future__ import annotations

import time
from typing import Any

import torch


class StepTimes:
    """Adds up the time of forward passes, backward passes and the optimizer over an update.

    On a GPU the times are those between events on the device, read once they have passed, an
    update later: nothing waits for them.

    Args:
        device: that the model is on.
        criterion: whose call is the forward pass.
    """

    def __init__(self, device: torch.device, criterion: torch.nn.Module):
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._earlier: list[tuple[str, Any, Any]] = []
        self._start = self._middle = self._now()
        criterion.register_forward_hook(self._end_forward)

    def begin_batch(self) -> None:
        """The forward pass of a micro-batch begins."""
        self._start = self._middle = self._now()

    def end_batch(self) -> None:
        """Its backward pass has ended."""
        self._spans += [
            ("forward", self._start, self._middle),
            ("backward", self._middle, self._now()),
        ]

    def begin_optimizer(self) -> None:
        """All gradients are there: they are reduced, clipped and applied."""
        self._start = self._now()

    def end_optimizer(self) -> None:
        """The weights are updated."""
        self._spans.append(("optimizer", self._start, self._now()))

    def take(self) -> dict[str, float]:
        """Milliseconds of each part in the update that ends, on a GPU in the one before."""
        spans, self._spans = self._spans, []
        if self._on_gpu:
            spans, self._earlier = self._earlier, spans
            if not all(end.query() for _, _, end in spans):
                return {}
        found: dict[str, float] = {}
        for name, start, end in spans:
            passed = start.elapsed_time(end) if self._on_gpu else 1000 * (end - start)
            found[name] = found.get(name, 0.0) + passed
        return found

    def _end_forward(self, *_: Any) -> None:
        self._middle = self._now()

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
