"""Mends of fairseq, fairscale and what they stand on: one file each, applied on import.

Each says what is broken, where upstream, and when it can go.
"""

from __future__ import annotations

import logging

from evomoe_plugin.compat import (
    before_loading,
    bf16_flag,
    checkpoint_autocast,
    checkpoint_fit,
    checkpoint_reading,
    checkpoint_writing,
    clip_norm,
    crash,
    data_wait,
    empty_batches,
    epoch_batches,
    exact_masters,
    expert_parallel,
    expert_saving,
    fsdp_cpu,
    fsdp_fp16,
    fsdp_frozen,
    fsdp_optimizer_state,
    gather_list,
    help,
    last_batch,
    launch,
    layout_change,
    num_updates,
    numpy_compat,
    object_broadcast,
    silent_commands,
    swish,
    symlink,
    train_start,
    trainer_cpu,
    update_end,
    user_module,
)
from evomoe_plugin.compat.mend import Mend, MendStatus

__all__ = ["MENDS", "Mend", "MendStatus", "apply_all", "report"]

logger = logging.getLogger(__name__)

MENDS: tuple[Mend, ...] = (
    silent_commands.MEND,
    swish.MEND,
    numpy_compat.MEND,
    object_broadcast.MEND,
    user_module.MEND,
    launch.MEND,
    help.MEND,
    last_batch.MEND,
    empty_batches.MEND,
    gather_list.MEND,
    epoch_batches.MEND,
    bf16_flag.MEND,
    trainer_cpu.MEND,
    clip_norm.MEND,
    checkpoint_autocast.MEND,
    fsdp_cpu.MEND,
    fsdp_fp16.MEND,
    fsdp_optimizer_state.MEND,
    fsdp_frozen.MEND,
    expert_parallel.MEND,
    exact_masters.MEND,
    expert_saving.MEND,
    num_updates.MEND,
    update_end.MEND,
    data_wait.MEND,
    symlink.MEND,
    checkpoint_writing.MEND,
    checkpoint_reading.MEND,
    before_loading.MEND,
    layout_change.MEND,
    checkpoint_fit.MEND,
    train_start.MEND,
    crash.MEND,
)

_statuses: dict[str, MendStatus] = {}


def apply_all() -> None:
    """Apply every mend that this environment needs; again, it does nothing."""
    for mend in MENDS:
        if mend.name in _statuses:
            continue
        reason = mend.needed()
        if reason is not None:
            mend.apply()
            logger.debug("mended %s: %s", mend.name, reason)
        _statuses[mend.name] = MendStatus(mend.name, reason is not None, reason or "not needed")


def report() -> list[MendStatus]:
    """What `apply_all` did, in the order of `MENDS`; empty before it ran."""
    return list(_statuses.values())
