"""The moving average of `--store-ema`: of each weight once, of the whole model, not of counters."""

from __future__ import annotations

from typing import Any

from fairseq.models.ema import ema
from torch import nn

from evomoe_plugin.patches.patch import Patch, always, replacing


def _step(average: ema.EMA, model: nn.Module, updates: Any = None) -> None:
    """One update: decay * average + (1 - decay) * weight; of other entries, the newest."""
    averages = average.fp32_params if average.config.ema_fp32 else average.model.state_dict()
    state, done = {}, set()
    for name, value in model.state_dict().items():
        own = averages[name] if name in averages else value.clone()
        if own.shape != value.shape:
            raise ValueError(f"{name} has another shape than its average: {value.shape}")
        if not own.is_floating_point() or "version" in name or name in average.skip_keys:
            own = value.to(own.dtype).clone()
        elif own.data_ptr() not in done:  # tied weights are one tensor under two names
            done.add(own.data_ptr())
            own.mul_(average.decay).add_(value.to(own.dtype), alpha=1 - average.decay)
        state[name] = own
    average.restore(state, build_fp32_params=False)


PATCH = Patch(
    name="ema",
    broken="--store-ema ends in a RuntimeError where a model has integer buffers; averages tied "
    "embeddings twice per update; and loses the final layer norm, since a decoder takes weights "
    "without their version for those of an early fairseq",
    upstream="fairseq/models/ema/ema.py: _step_internal",
    remove_when="fairseq's EMA leaves integers alone, and steps over parameters instead of names",
    needed=always("the average is of every weight once"),
    apply=replacing(ema.EMA, _step_internal=_step),
)
