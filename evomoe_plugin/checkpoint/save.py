"""Saving a checkpoint: whole or not at all, in the foreground or behind the training."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils, utils
from fairseq.data import data_utils
from fairseq.file_io import PathManager

from evomoe_plugin.checkpoint import (
    async_writer,
    atomic_files,
    expert_files,
    expert_loading,
    expert_saving,
)
from evomoe_plugin.checkpoint.atomic_files import CheckpointFiles
from evomoe_plugin.checkpoint.sharded_experts import divided
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.patches.patch import ModuleView, Patch, always, wrap

logger = logging.getLogger(__name__)

# What upstream draws the last digit of checkpoint.best_* from: numpy's own generator belongs to
# the training, which may draw from it while we save.
_dice = np.random.RandomState()


@contextlib.contextmanager
def _seed_dice(*seeds: float) -> Iterator[None]:
    _dice.seed(int(hash(seeds) % 1e6))  # the same digit on every rank
    yield


class _TakenState:
    """The trainer at the moment of saving, as upstream's `save_checkpoint` asks for it.

    Upstream decides names, what is best, and what is no longer kept. Given this in place of the
    trainer it can do so in another thread, while the trainer trains on. The collectives of FSDP
    have taken place by then, on all ranks, even where no file turns out to be due.
    """

    def __init__(self, trainer: Any, experts: Any = None):
        self._experts = None
        if experts is None:
            trainer.consolidate_optimizer()
            self._state = utils.move_to_cpu(trainer.state_dict())
        else:
            self._state, self._experts = expert_saving.take(trainer, experts)
        self._num_updates = trainer.get_num_updates()
        self.task = trainer.task
        self.checkpoint_suffix = trainer.checkpoint_suffix
        self.data_parallel_rank = trainer.data_parallel_rank
        self.should_save_checkpoint_on_current_rank = trainer.should_save_checkpoint_on_current_rank
        self.always_call_state_dict_during_save_checkpoint = False

    @property
    def needs_all_ranks(self) -> bool:
        """Whether other processes write a part of it."""
        return self._experts is not None

    def own_copy(self) -> None:
        """Let the training go on without changing what is to be written."""
        self._state = _own_copy(self._state, {})

    def consolidate_optimizer(self) -> None:
        """It was done when the state was taken."""

    def get_num_updates(self) -> int:
        return self._num_updates

    def save_checkpoint(self, filename: str, extra_state: dict) -> str:
        self._state["extra_state"].update(extra_state)
        if self._experts is None:
            atomic_files.save(self._state, filename)
            expert_files.keep_only(filename, ())
        else:
            with self._experts.beside(self._state, filename):
                atomic_files.save(self._state, filename)
        return os.path.abspath(filename)

    def finish(self) -> None:
        """To be called on every process, when all that was to be saved is."""
        if self._experts is not None:
            self._experts.finish()


class _TakenIterator:
    """The epoch iterator at the moment of saving."""

    def __init__(self, epoch_itr: Any):
        self.epoch = epoch_itr.epoch
        self._end_of_epoch = epoch_itr.end_of_epoch()
        self._state = epoch_itr.state_dict()

    def end_of_epoch(self) -> bool:
        return self._end_of_epoch

    def state_dict(self) -> dict:
        return self._state


def _own_copy(value: Any, copies: dict) -> Any:
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


def _save_checkpoint(
    upstream: Callable, cfg: Any, trainer: Any, epoch_itr: Any, val_loss: float | None
) -> str | None:
    """In place of `checkpoint_utils.save_checkpoint`, with the same results.

    Raises:
        RunFailed: this checkpoint, or the one before that was written in the async_writer, could
            not be written.
    """
    async_writer.wait()
    experts = divided(trainer)
    saves = trainer.should_save_checkpoint_on_current_rank
    if cfg.no_save or not (saves or experts is not None):
        return upstream(cfg, trainer, epoch_itr, val_loss)
    state = _TakenState(trainer, experts)
    # A task that asks to see each file gets it at once.
    later = cfg.write_checkpoints_asynchronously and not hasattr(trainer.task, "post_save")
    if later and state.needs_all_ranks:
        if saves:
            _tell_not_asynchronous()
        later = False
    if later and saves:
        state.own_copy()
    in_turn = copy.deepcopy(cfg)
    in_turn.write_checkpoints_asynchronously = False
    job = functools.partial(
        _save, upstream, in_turn, state, _TakenIterator(epoch_itr), val_loss
    )
    if not later or not saves:
        return job()
    async_writer.submit(job)
    return None


@functools.cache
def _tell_not_asynchronous() -> None:
    logger.warning("--write-checkpoints-asynchronously: training waits while processes write "
                   "their experts; --moe-ep-checkpoint consolidated does not")


def _save(
    upstream: Callable, cfg: Any, state: _TakenState, iterator: _TakenIterator, val_loss: Any
) -> str | None:
    with atomic_files.linking(getattr(cfg, "symlink", False)):
        saved = upstream(cfg, state, iterator, val_loss)
    state.finish()
    return saved


def _wait_for_background() -> bool:
    """In place of iopath's `async_close`, at the end of fairseq's `main`."""
    async_writer.wait()
    return True


def _load_checkpoint(upstream: Callable, cfg: Any, trainer: Any, **kwargs: Any) -> Any:
    """As upstream, after removing what a killed run left half-written."""
    if trainer.data_parallel_rank == 0 and not cfg.no_save:
        atomic_files.remove_leftovers(cfg.save_dir)
        expert_loading.remove_stale(cfg.save_dir)
    return upstream(cfg, trainer, **kwargs)


def _verify_checkpoint_directory(upstream: Callable, save_dir: str) -> None:
    try:
        upstream(save_dir)
    except OSError as error:
        raise OptionError("save_dir", save_dir, f"cannot be written: {error.strerror}") from error


@functools.cache
def apply() -> None:
    wrap(checkpoint_utils, "save_checkpoint", _save_checkpoint)
    wrap(checkpoint_utils, "load_checkpoint", _load_checkpoint)
    wrap(checkpoint_utils, "verify_checkpoint_directory", _verify_checkpoint_directory)
    checkpoint_utils.torch_persistent_save = atomic_files.save
    checkpoint_utils.PathManager = CheckpointFiles
    checkpoint_utils.os = ModuleView(os, remove=atomic_files.remove)
    checkpoint_utils.np = ModuleView(np, random=_dice)
    checkpoint_utils.data_utils = ModuleView(data_utils, numpy_seed=_seed_dice)
    PathManager.async_close = staticmethod(_wait_for_background)


PATCH = Patch(
    name="checkpoint-writing",
    broken="checkpoint_last.pt is overwritten in place, so a kill at the wrong moment loses it; "
           "--write-checkpoints-asynchronously writes no checkpoint_last.pt and loses errors; a "
           "full disk is retried into the same file; with FSDP and no file due, ranks wait for "
           "each other for ever",
    upstream="fairseq/checkpoint_utils.py: save_checkpoint, torch_persistent_save",
    remove_when="fairseq writes every name through a temporary file and waits for its writers",
    needed=always("checkpoints are whole or absent"),
    apply=apply,
)
