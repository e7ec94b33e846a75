"""Patches of faults in fairseq, fairscale and what they depend on: one file each.

Each says what is broken, where upstream, and when it can go. Features are not patches: they lie
with the trainer, the launcher or the checkpoint format.
"""

from __future__ import annotations

import logging

from evomoe_plugin.patches import (
    bf16_flag,
    checkpoint_autocast,
    checkpoint_loading,
    clip_norm,
    ddp_cpu,
    empty_batches,
    epoch_batches,
    fp16_cpu,
    fsdp_cpu,
    fsdp_fp16,
    fsdp_frozen,
    fsdp_optimizer_state,
    gather_list,
    help,
    last_batch,
    numpy_compat,
    object_broadcast,
    quiet_imports,
    silent_commands,
    swish,
    user_module,
)
from evomoe_plugin.patches.patch import Patch, PatchStatus

__all__ = ["PATCHES", "Patch", "PatchStatus", "apply_all", "report"]

logger = logging.getLogger(__name__)

PATCHES: tuple[Patch, ...] = (
    quiet_imports.PATCH,
    silent_commands.PATCH,
    swish.PATCH,
    numpy_compat.PATCH,
    object_broadcast.PATCH,
    user_module.PATCH,
    help.PATCH,
    last_batch.PATCH,
    empty_batches.PATCH,
    gather_list.PATCH,
    epoch_batches.PATCH,
    bf16_flag.PATCH,
    ddp_cpu.PATCH,
    fp16_cpu.PATCH,
    clip_norm.PATCH,
    checkpoint_autocast.PATCH,
    checkpoint_loading.PATCH,
    fsdp_cpu.PATCH,
    fsdp_fp16.PATCH,
    fsdp_optimizer_state.PATCH,
    fsdp_frozen.PATCH,
)

_statuses: dict[str, PatchStatus] = {}


def apply_all() -> None:
    """Apply every patch that this environment needs; again, it does nothing."""
    for patch in PATCHES:
        if patch.name in _statuses:
            continue
        reason = patch.needed()
        if reason is not None:
            patch.apply()
            logger.debug("patched %s: %s", patch.name, reason)
        _statuses[patch.name] = PatchStatus(patch.name, reason is not None, reason or "not needed")


def report() -> list[PatchStatus]:
    """The status of each patch, in the order of `PATCHES`; empty before `apply_all`."""
    return list(_statuses.values())
