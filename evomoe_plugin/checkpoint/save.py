"""Save a run's checkpoints under fairseq's names, whole or not at all."""

from __future__ import annotations

import copy
import functools
import logging
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils, utils

from evomoe_plugin.checkpoint import async_writer, checkpoint_files, expert_files, expert_saving
from evomoe_plugin.checkpoint.sharded_experts import sharded_experts

logger = logging.getLogger(__name__)


def save_checkpoint(cfg: Any, trainer: Any, epoch_itr: Any, val_loss: float | None) -> str | None:
    """In place of fairseq's `checkpoint_utils.save_checkpoint`, called on all ranks.

    Args:
        cfg: fairseq's `CheckpointConfig`.
    Returns:
        The first file that was written; None for none, or where it is written in the background.
    Raises:
        RunFailed: this checkpoint, or the one before that was written in the background, could
            not be written.
    """
    async_writer.wait()
    if trainer.data_parallel_rank == 0:
        os.makedirs(cfg.save_dir, exist_ok=True)
    if val_loss is not None and math.isnan(val_loss):  # of no order: the best would be forgotten
        logger.warning("validation gave NaN: this checkpoint has no score")
        val_loss = None
    _update_best(cfg, val_loss)
    if cfg.no_save:
        return None
    state = TrainerState(trainer)
    if not trainer.should_save_checkpoint_on_current_rank:
        state.finish()
        return None
    updates, suffix = trainer.get_num_updates(), trainer.checkpoint_suffix
    logger.info("Preparing to save checkpoint for epoch %d @ %d updates", epoch_itr.epoch, updates)
    paths = [
        os.path.join(cfg.save_dir, name) for name in _due(cfg, epoch_itr, updates, suffix, val_loss)
    ]
    state.add_extra(_extra_state(trainer.task, epoch_itr, val_loss))
    job = functools.partial(
        _write,
        copy.deepcopy(cfg),
        state,
        paths,
        epoch_itr.end_of_epoch(),
        suffix,
        (epoch_itr.epoch, updates, val_loss),
    )
    # A task that asks to see each file gets it at once.
    if not cfg.write_checkpoints_asynchronously or hasattr(trainer.task, "post_save"):
        return job()
    if state.needs_all_ranks:
        _warn_not_asynchronous()
        return job()
    state.own_copy()
    async_writer.submit(job)
    return None


class TrainerState:
    """A trainer's state at one update. Taking it is a collective of all ranks."""

    def __init__(self, trainer: Any):
        experts = sharded_experts(trainer)
        self._experts = None
        self._state: dict[str, Any] = {}
        if experts is not None:
            self._state, self._experts = expert_saving.take(trainer, experts)
            return
        trainer.consolidate_optimizer()
        if trainer.should_save_checkpoint_on_current_rank:
            self._state = utils.move_to_cpu(trainer.state_dict())
        elif trainer.always_call_state_dict_during_save_checkpoint:
            trainer.state_dict()  # FSDP gathers

    @property
    def needs_all_ranks(self) -> bool:
        """Whether other ranks write a part of it."""
        return self._experts is not None

    def add_extra(self, extra_state: dict[str, Any]) -> None:
        """Add to fairseq's `extra_state`."""
        self._state["extra_state"].update(extra_state)

    def own_copy(self) -> None:
        """Copy the tensors, so that training can go on while they are written."""
        self._state = _own_copy(self._state, {})

    def write(self, path: str) -> None:
        """Write it to `path`; with experts in files of their own, `finish` must follow."""
        if self._experts is None:
            checkpoint_files.save(self._state, path)
            expert_files.keep_only(path, ())
        else:
            with self._experts.beside(self._state, path):
                checkpoint_files.save(self._state, path)

    def finish(self) -> None:
        """End the save; called on every rank."""
        if self._experts is not None:
            self._experts.finish()


def _own_copy(value: Any, copies: dict[Any, torch.Tensor]) -> Any:
    """`value` with tensors of its own; tensors that share memory keep sharing theirs."""
    if torch.is_tensor(value):
        key = (value.data_ptr(), value.dtype, value.storage_offset(), value.shape, value.stride())
        if value.numel() == 0 or key not in copies:
            copies[key] = value.detach().clone()
        return copies[key]
    if isinstance(value, dict):
        taken = copy.copy(value)  # an OrderedDict keeps its kind and its metadata
        for name, item in value.items():
            taken[name] = _own_copy(item, copies)
        return taken
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_own_copy(item, copies) for item in value)
    return copy.deepcopy(value)


def _update_best(cfg: Any, val_loss: float | None) -> None:
    """fairseq keeps the best score, which resuming restores, as an attribute of the function."""
    if val_loss is not None:
        better = max if cfg.maximize_best_checkpoint_metric else min
        function = checkpoint_utils.save_checkpoint
        function.best = better(val_loss, getattr(function, "best", val_loss))


def _best() -> float | None:
    return getattr(checkpoint_utils.save_checkpoint, "best", None)


def _extra_state(task: Any, epoch_itr: Any, val_loss: float | None) -> dict[str, Any]:
    extra = {"train_iterator": epoch_itr.state_dict(), "val_loss": val_loss}
    if hasattr(task, "get_checkpoint_dict"):
        extra.update(task.get_checkpoint_dict())
    if _best() is not None:
        extra["best"] = _best()
    return extra


def _due(
    cfg: Any, epoch_itr: Any, updates: int, suffix: str, val_loss: float | None
) -> Iterator[str]:
    """The names under which this checkpoint is kept."""
    epoch = epoch_itr.epoch
    if epoch_itr.end_of_epoch():
        if not cfg.no_epoch_checkpoints and epoch % cfg.save_interval == 0:
            yield f"checkpoint{epoch}{suffix}.pt"
    elif cfg.save_interval_updates > 0 and updates % cfg.save_interval_updates == 0:
        yield f"checkpoint_{epoch}_{updates}{suffix}.pt"
    if val_loss is not None:
        if _is_better(cfg, val_loss, _best()):
            yield f"checkpoint_best{suffix}.pt"
        if cfg.keep_best_checkpoints > 0 and _is_better(cfg, val_loss, _worst_kept(cfg, suffix)):
            # A digit tells equal scores apart: the same on all ranks, and not of a generator that
            # the training draws from.
            seed = int(hash((epoch, updates, val_loss)) % 1e6)
            digit = np.random.RandomState(seed).randint(0, cfg.keep_best_checkpoints)
            yield f"checkpoint.best_{cfg.best_checkpoint_metric}_{val_loss:.3f}{digit}{suffix}.pt"
    if not cfg.no_last_checkpoints:
        yield f"checkpoint_last{suffix}.pt"


def _is_better(cfg: Any, score: float, other: float | None) -> bool:
    if other is None:
        return True
    return score >= other if cfg.maximize_best_checkpoint_metric else score <= other


def _kept_best(cfg: Any, suffix: str) -> list[str]:
    """The files `checkpoint.best_*`, from the best to the worst."""
    paths = checkpoint_utils.checkpoint_paths(
        cfg.save_dir,
        pattern=rf"checkpoint\.best_{cfg.best_checkpoint_metric}_(\d+\.?\d*){suffix}\.pt",
    )
    return paths if cfg.maximize_best_checkpoint_metric else paths[::-1]


def _worst_kept(cfg: Any, suffix: str) -> float | None:
    paths = _kept_best(cfg, suffix)
    return float(paths[-1].rsplit("_")[-1].replace(f"{suffix}.pt", "")) if paths else _best()


def _write(
    cfg: Any,
    state: TrainerState,
    paths: list[str],
    end_of_epoch: bool,
    suffix: str,
    written: tuple[int, int, float | None],
) -> str | None:
    """Write all names of one checkpoint, then remove those that are no longer kept."""
    began = time.monotonic()
    for path in paths[:1]:
        state.write(path)
    for path in paths[1:]:
        checkpoint_files.copy(paths[0], path, symlink=getattr(cfg, "symlink", False))
    if paths:
        logger.info(
            "Saved checkpoint %s (epoch %d @ %d updates, score %s) (writing took %.1f seconds)",
            paths[0],
            *written,
            time.monotonic() - began,
        )
    for path in _outdated(cfg, end_of_epoch, suffix):
        checkpoint_files.remove(path)
    state.finish()
    return os.path.abspath(paths[0]) if paths else None


def _outdated(cfg: Any, end_of_epoch: bool, suffix: str) -> Iterator[str]:
    """The files that options let go of; fairseq lists them from the newest on."""
    listed = functools.partial(checkpoint_utils.checkpoint_paths, cfg.save_dir)
    if not end_of_epoch and cfg.keep_interval_updates > 0:
        found = listed(pattern=rf"checkpoint_\d+_(\d+){suffix}\.pt", keep_match=True)
        every = cfg.keep_interval_updates_pattern
        paths = [path for path, update in found if every == -1 or update % every]
        yield from paths[cfg.keep_interval_updates :]
    if cfg.keep_last_epochs > 0:
        yield from listed(pattern=rf"checkpoint(\d+){suffix}\.pt")[cfg.keep_last_epochs :]
    if cfg.keep_best_checkpoints > 0:
        yield from _kept_best(cfg, suffix)[cfg.keep_best_checkpoints :]


@functools.cache
def _warn_not_asynchronous() -> None:
    logger.warning(
        "--write-checkpoints-asynchronously: training waits while ranks write their "
        "experts; --moe-ep-checkpoint consolidated does not"
    )
