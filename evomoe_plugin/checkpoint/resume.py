"""Read a checkpoint for a trainer: found, checked, and fitted to the parallelism of the run."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from evomoe_plugin.checkpoint import fsdp_shards
from evomoe_plugin.checkpoint.build_model import describe
from evomoe_plugin.checkpoint.expert_shards import ExpertShards, manifest_of, merge
from evomoe_plugin.checkpoint.load import read_state
from evomoe_plugin.checkpoint.optimizer_layout import (
    OptimizerLayout,
    check_number_trained,
    fsdp_layout,
    is_flat,
    plain_layout,
)
from evomoe_plugin.checkpoint.sharded_experts import ShardedExperts, sharded_experts
from evomoe_plugin.config.errors import OptionError

logger = logging.getLogger(__name__)

# Wrappers of the same optimizer: without FSDP, and with it or --memory-efficient-fp16.
HALF_PRECISION = ("FP16Optimizer", "MemoryEfficientFP16Optimizer")

# Optimizers whose state is the same, by what `--optimizer` calls them.
SAME_STATE = {"adam": "FairseqAdam", "fused_adamw": "FusedAdamW"}


_NUMBERED = re.compile(r"checkpoint(_\d+_)?\d+(-shard\d+)?\.pt")
_RESETS = ("reset_optimizer", "reset_meters", "reset_dataloader", "reset_lr_scheduler")


def check_begins(checkpoint: Any, path: str) -> None:
    """Refuse to begin a run in a folder of another, whose `checkpoint_last.pt` is gone.

    With one numbered checkpoint, a warning: a run that was killed in its first save left it.

    Args:
        checkpoint: fairseq's `CheckpointConfig`.
        path: of the file that is missing.
    Raises:
        OptionError: there are several numbered checkpoints, and no option asks for a new run.
    """
    asked = checkpoint.restore_file != "checkpoint_last.pt" or any(
        getattr(checkpoint, name) for name in _RESETS
    )
    if asked or not os.path.isdir(checkpoint.save_dir):
        return
    folder = Path(checkpoint.save_dir)
    others = [p for p in folder.iterdir() if p.is_file() and _NUMBERED.fullmatch(p.name)]
    names = sorted({re.sub(r"-shard\d+", "", p.name) for p in others})
    if not names:
        return
    newest = re.sub(r"-shard\d+", "", max(others, key=lambda p: p.stat().st_mtime).name)
    remedy = f"to go on from it, give --restore-file {folder / newest}"
    if len(names) == 1:
        logger.warning(
            "%s is missing, beside %s: a new run begins; %s", Path(path).name, newest, remedy
        )
        return
    raise OptionError(
        "save_dir",
        checkpoint.save_dir,
        f"has no {Path(path).name}, but {len(names)} other checkpoints, as {newest}: {remedy}; "
        "for a new run, give another folder",
    )


def file_to_read(trainer: Any, filename: str) -> str:
    """The file to read for `filename`: itself, or else a shard of the same checkpoint.

    Raises:
        OptionError: it exists in a form that this run cannot read, or was named and is missing.
    """
    if os.path.isfile(filename):
        return filename
    if os.path.lexists(filename):
        raise OptionError("checkpoint", filename, "is no file, or a link to one that is missing")
    first_shard = fsdp_shards.shard_path(filename, 0)
    whole = fsdp_shards.SHARD.sub(".pt", filename)
    if trainer.layout.reads_own_shard:
        if os.path.exists(first_shard):
            # Names the shard that is missing, unless this run only has more ranks.
            state = fsdp_shards.consolidated(filename, read_state)
            raise _other_world_size(fsdp_shards.world_size(state), trainer)
        if os.path.exists(whole):
            raise OptionError(
                "use_sharded_state",
                "",
                f"{whole} is one file for all ranks: resume without --use-sharded-state",
            )
    elif os.path.exists(first_shard):
        logger.info("%s was written with --use-sharded-state: consolidating the shards", filename)
        return first_shard
    given = trainer.cfg.checkpoint.restore_file
    if given != "checkpoint_last.pt":
        raise OptionError("restore_file", given, f"there is no {filename}")
    return filename


def _other_world_size(count: int, trainer: Any) -> OptionError:
    return OptionError(
        "distributed_world_size",
        trainer.data_parallel_world_size,
        f"the checkpoint has {count} shards: give {count}, or leave --use-sharded-state out, "
        "which consolidates them",
    )


class TornCheckpoint(OptionError):
    """The ranks' shards are of different updates, as an interrupted save leaves them."""


def earlier_whole(trainer: Any, filename: str) -> str | None:
    """The newest checkpoint of an update or epoch of which every rank has its shard.

    Returns:
        This rank's file; None if there is none, or if the user chose the one that cannot be read.
    """
    if trainer.cfg.checkpoint.restore_file != "checkpoint_last.pt":
        return None
    folder, suffix = os.path.dirname(filename), trainer.checkpoint_suffix
    found = re.compile(rf"checkpoint(_?)(\d+)(?:_(\d+))?{re.escape(suffix)}\.pt")
    # The last of an epoch is written at its end.
    own = {
        (int(name[2]), int(name[3] or sys.maxsize))
        for name in map(found.fullmatch, os.listdir(folder))
        if name and bool(name[1]) == bool(name[3])
    }
    of_ranks = [own] * trainer.data_parallel_world_size
    dist.all_gather_object(of_ranks, own, group=trainer.data_parallel_process_group)
    whole = set.intersection(*of_ranks)
    if not whole:
        return None
    epoch, update = max(whole)
    name = f"checkpoint{epoch}" if update == sys.maxsize else f"checkpoint_{epoch}_{update}"
    return os.path.join(folder, f"{name}{suffix}.pt")


def check_all_have_shards(trainer: Any, filename: str, exists: bool) -> None:
    """Raise `OptionError` on all ranks if some have a file of their own, and others have none."""
    found = [exists] * trainer.data_parallel_world_size
    dist.all_gather_object(found, exists, group=trainer.data_parallel_process_group)
    if len(set(found)) > 1:
        missing = fsdp_shards.shard_path(filename, found.index(False))
        raise OptionError(
            "checkpoint",
            fsdp_shards.SHARD.sub(".pt", filename),
            f"shard {found.index(False)} of {len(found)} is missing: {missing}; take another "
            "checkpoint with --restore-file, or remove this one's files to begin anew",
        )


def check_same_update(trainer: Any, filename: str, num_updates: int) -> None:
    """Raise `TornCheckpoint` if the ranks' shards are of different updates."""
    updates = [num_updates] * trainer.data_parallel_world_size
    dist.all_gather_object(updates, num_updates, group=trainer.data_parallel_process_group)
    if len(set(updates)) > 1:
        raise TornCheckpoint(
            "checkpoint",
            fsdp_shards.SHARD.sub(".pt", filename),
            f"its shards are of different updates ({', '.join(map(str, updates))}):"
            " take an earlier one with --restore-file",
        )


def read_for(
    trainer: Any,
    path: str,
    reset_optimizer: bool,
    on_all_ranks: bool,
    check: Callable[[dict[str, Any], str], None],
) -> dict[str, Any]:
    """What a run like `trainer`'s would have written: this rank's experts, its optimizer layout.

    Args:
        path: as `file_to_read` gives it.
        reset_optimizer: the optimizer's state is not used, and stays as it is.
        check: called with the whole state and the path, before anything is taken from it.
    """
    read = partial(read_state, load_on_all_ranks=on_all_ranks)
    if trainer.layout.reads_own_shard:
        state = read(path)
        if fsdp_shards.world_size(state) != trainer.data_parallel_world_size:
            raise _other_world_size(fsdp_shards.world_size(state), trainer)
        fsdp_shards.check_rank(state, path)
        check(state, path)
        _rename_optimizer(state, trainer)
        return state
    is_shard = fsdp_shards.SHARD.search(path)
    state = fsdp_shards.consolidated(path, read) if is_shard else read(path)
    _rescale_iterator(state, trainer)
    experts, manifest = sharded_experts(trainer), manifest_of(state, path)
    if experts is not None:
        experts.check(state, path)
    if manifest is not None:
        merge(
            state,
            ExpertShards(path, manifest),
            experts.groups.own if experts else None,
            with_optimizer=not reset_optimizer,
        )
    check(state, path)
    if not reset_optimizer:
        try:
            _fit_optimizer(state, trainer, None if manifest is not None else experts)
        except OptionError:
            raise
        except Exception as error:  # of a state of other parameters, anything
            raise OptionError(
                "checkpoint",
                path,
                f"its optimizer state does not fit its weights ({describe(error)}): take an "
                "earlier one, or --reset-optimizer",
            ) from error
    if experts is not None and manifest is None:
        experts.keep_own(state["model"])
    return state


def _fit_optimizer(state: dict, trainer: Any, whole: ShardedExperts | None = None) -> None:
    """Change the optimizer's state to the layout of `trainer`'s.

    Args:
        whole: sharded experts of which the state still has all rows.
    """
    optimizer = state.get("last_optimizer_state")
    if not optimizer:
        return
    _rename_optimizer(state, trainer)
    was_fsdp = "param_id_map" in optimizer
    new = trainer.layout.optimizer_layout(trainer)
    if (
        not was_fsdp
        and new.modules is None
        and whole is None
        and (is_flat(optimizer, new) == new.is_flat)
    ):
        check_number_trained(optimizer, new)
        return
    written = new if whole is None else whole.unsharded(new)
    old = fsdp_layout(state, new.names) if was_fsdp else plain_layout(state, written)
    check_number_trained(optimizer, old)
    if old == new:
        return
    logger.info(
        "converting the optimizer's state from %s to %s", _layout_name(old), _layout_name(new)
    )
    named = old.by_name(optimizer)
    if whole is not None:
        named = whole.own_moments(named)
    state["last_optimizer_state"] = new.state(named, optimizer)


def _rename_optimizer(state: dict, trainer: Any) -> None:
    """Give the trainer's name to an optimizer that keeps the same state under another."""
    history = state["optimizer_history"][-1]
    if history["optimizer_name"] in HALF_PRECISION and trainer.cfg.common.fp16:
        efficient = trainer.layout.is_fully_sharded or trainer.cfg.common.memory_efficient_fp16
        history["optimizer_name"] = HALF_PRECISION[efficient]
    elif history["optimizer_name"] in SAME_STATE.values():
        history["optimizer_name"] = SAME_STATE.get(
            trainer.cfg.optimizer._name, history["optimizer_name"]
        )


def _layout_name(layout: OptimizerLayout) -> str:
    if layout.modules is not None:
        return "fully sharded"
    return "flat" if layout.is_flat else "plain"


def _rescale_iterator(state: dict, trainer: Any) -> None:
    """Count batches of this many ranks: each takes every N-th batch of the epoch."""
    iterator = state.get("extra_state", {}).get("train_iterator")
    if not iterator or not state.get("cfg"):
        return
    before, now = fsdp_shards.world_size(state), trainer.data_parallel_world_size
    position = iterator.get("iterations_in_epoch", 0)
    if before == now or position == 0:
        return
    iterator["iterations_in_epoch"] = position * before // now
    again = position * before % now
    logger.info(
        "resuming at batch %d of each of %d ranks, which was %d of each of %d%s",
        iterator["iterations_in_epoch"],
        now,
        position,
        before,
        f"; {again} batches are seen again" if again else "",
    )
