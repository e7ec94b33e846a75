"""Patches of faults in fairseq, fairscale and what they depend on: one file each.

Each says what is broken, where upstream, and when it can go. Features are not patches: they lie
with the trainer, the launcher or the checkpoint format.
"""

from __future__ import annotations

import logging
from importlib import import_module

from evomoe_plugin.patches.patch import Patch, PatchStatus

logger = logging.getLogger(__name__)

# The files of this folder, in the order in which they are applied.
_FILES = """
    quiet_imports silent_commands swish numpy_compat object_broadcast user_module help
    refused_options positions validated_task sample_sizes context_window last_batch skipped_samples
    empty_batches gather_list epoch_batches epoch_place bf16_flag generate_share model_overrides
    byte_pieces empty_split
    ddp_cpu fp16_cpu clip_norm checkpoint_autocast checkpoint_loading ema fsdp_cpu fsdp_fp16
    fsdp_optimizer_state fsdp_frozen
"""
PATCHES: tuple[Patch, ...] = tuple(
    import_module(f"{__name__}.{file}").PATCH for file in _FILES.split()
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
