"""What a host does without waiting for a GPU, which on a CPU would only cost time."""

from __future__ import annotations

import torch

MOST_UNCOUNTED = 2**16
"""Where the gate's choices decide on the number of pairs, and token by expert are not more than
this, memory is allocated for all of them, and their number stays on the device. Larger layers keep
a GPU busy for longer than the host waits, and would need more memory than they use."""


def waiting_costs(device: torch.device) -> bool:
    """Whether the host waits for `device` when it reads a value or needs a shape from it."""
    return device.type != "cpu"
