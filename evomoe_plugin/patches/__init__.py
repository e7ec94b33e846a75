"""Mends of fairseq, fairscale and what they stand on: one file each, applied on import.

Each says what is broken, where upstream, and when it can go.
"""

from __future__ import annotations

import logging

from evomoe_plugin.checkpoint import expert_saving, layout_change, save
from evomoe_plugin.config import symlink
from evomoe_plugin.launch import call_main
from evomoe_plugin.patches import (
    bf16_flag,
    checkpoint_autocast,
    checkpoint_fit,
    checkpoint_reading,
    clip_norm,
    crash,
    empty_batches,
    epoch_batches,
    fsdp_cpu,
    fsdp_fp16,
    fsdp_frozen,
    fsdp_optimizer_state,
    gather_list,
    help,
    last_batch,
    num_updates,
    numpy_compat,
    object_broadcast,
    quiet_imports,
    silent_commands,
    swish,
    trainer_cpu,
    user_module,
)
from evomoe_plugin.patches.patch import Patch, PatchStatus
from evomoe_plugin.trainer import (
    before_loading,
    data_wait,
    expert_parallel,
    fp32_masters,
    train_start,
    update_end,
)

__all__ = ["PATCHES", "Patch", "PatchStatus", "apply_all", "report"]

logger = logging.getLogger(__name__)

PATCHES: tuple[Patch, ...] = (
    quiet_imports.PATCH,
    silent_commands.PATCH,
    swish.PATCH,
    numpy_compat.PATCH,
    object_broadcast.PATCH,
    user_module.PATCH,
    call_main.PATCH,
    help.PATCH,
    last_batch.PATCH,
    empty_batches.PATCH,
    gather_list.PATCH,
    epoch_batches.PATCH,
    bf16_flag.PATCH,
    trainer_cpu.PATCH,
    clip_norm.PATCH,
    checkpoint_autocast.PATCH,
    fsdp_cpu.PATCH,
    fsdp_fp16.PATCH,
    fsdp_optimizer_state.PATCH,
    fsdp_frozen.PATCH,
    expert_parallel.PATCH,
    fp32_masters.PATCH,
    expert_saving.PATCH,
    num_updates.PATCH,
    update_end.PATCH,
    data_wait.PATCH,
    symlink.PATCH,
    save.PATCH,
    checkpoint_reading.PATCH,
    before_loading.PATCH,
    layout_change.PATCH,
    checkpoint_fit.PATCH,
    train_start.PATCH,
    crash.PATCH,
)

_statuses: dict[str, PatchStatus] = {}


def apply_all() -> None:
    """Apply every mend that this environment needs; again, it does nothing."""
    for mend in PATCHES:
        if mend.name in _statuses:
            continue
        reason = mend.needed()
        if reason is not None:
            mend.apply()
            logger.debug("mended %s: %s", mend.name, reason)
        _statuses[mend.name] = PatchStatus(mend.name, reason is not None, reason or "not needed")


def report() -> list[PatchStatus]:
    """What `apply_all` did, in the order of `PATCHES`; empty before it ran."""
    return list(_statuses.values())
