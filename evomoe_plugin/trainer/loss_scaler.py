"""The loss scaler of --fp16 (fairseq's) or --amp (torch's): its scale, its state in checkpoints."""

from __future__ import annotations

from typing import Any

# Of fairseq's DynamicLossScaler, whose optimizer saves the scale alone.
_COUNTERS = ("_iter", "_last_overflow_iter", "_last_rescale_iter", "_overflows_since_rescale")


def scale(scaler: Any) -> float:
    """The factor of the loss."""
    return scaler.get_scale() if hasattr(scaler, "get_scale") else scaler.loss_scale


def state_dict(scaler: Any) -> dict[str, Any]:
    """What the optimizer's state lacks: fairseq's counters, all of torch's scaler."""
    if hasattr(scaler, "state_dict"):
        return scaler.state_dict()
    return {name: value for name, value in vars(scaler).items() if name in _COUNTERS}


def restore(scaler: Any, state: dict[str, Any]) -> None:
    """Set the state; an empty one, or that of the other kind of scaler, changes nothing."""
    if not state or ("scale" in state) != hasattr(scaler, "state_dict"):
        return  # of an earlier version, or of another precision
    if hasattr(scaler, "state_dict"):
        scaler.load_state_dict(state)
    else:
        vars(scaler).update(state)
